"""What the tests of the recipes share: a tiny configuration, and ways to run a recipe."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from timm_autoslim.recipes import train
from timm_autoslim.recipes.lib.configuration import parse_args

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
TINY = {
    "model": "resnet10t", "model_kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8}, "in_chans": 1, "img_size": 16,
    "mean": [0.5], "std": [0.5], "limit_train": 160, "held_out": 32, "batch_size": 32, "calibration_images": 64,
    "threads": 1, "color_jitter": 0.0, "warmup_epochs": 0, "lr": 0.05, "epochs": 1, "search_steps": 2,
    "budgets": ["macs=60%"], "val_widths": [0.5],
}  # fmt: skip


def write_config(folder, **changes):
    """Write the tiny configuration; return its path as a text."""
    path = Path(folder) / "config.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return str(path)


def parse(recipe, config, *argv):
    """Return the flags of a recipe."""
    return parse_args(recipe, None, [*argv, "-c", config])


def parse_train(folder, *argv, num_classes=10, **changes):
    """Return the flags of train.py, with the number of classes that the digits have."""
    args = parse("train", write_config(folder, **changes), *argv)
    args.num_classes = num_classes
    return args


def run_train(folder, name, *argv, **changes):
    """Run train.py in this process; return the run folder."""
    train.main(["-c", write_config(folder, **changes), "--output", str(folder), "--experiment", name, *argv])
    return folder / name


def launch(*command, **variables):
    """Run Python in a process of its own, on one thread."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def launch_two(*command, **variables):
    """Run a script in two CPU processes: `--cpu --num_processes 2` would silently be one."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    return launch(*launcher, *command, ACCELERATE_USE_CPU="true", **variables)
