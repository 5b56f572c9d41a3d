"""The whole road with one command: train a supernet, search, fine-tune what was found, export, load again, compare.

    python recipes/run.py
    python recipes/run.py -c recipes/configs/cifar10_resnet.yaml --data-dir data/cifar10 --num-processes 1

Any key of the configuration may be given as a flag too, prefixes included: --train-epochs 3 --budgets macs=40%.
Each stage is an ordinary command that is printed before it runs; finished stages are skipped when the same command is
given again, so an interrupted road goes on where it stopped. The run folder then holds table.md besides what each
recipe leaves there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from common import command, parse_args, read_args, read_config, values_for
from data import open_images, plain_loader
from processes import make_accelerator
from validation import evaluate

import timm_autoslim  # noqa: F401  (registers the exported models with timm)
from timm_autoslim.errors import ArtifactError, ConfigError
from timm_autoslim.utils.files import write_text

HERE = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> None:
    """Run the road."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-c", "--config", default=str(HERE / "configs" / "digits.yaml"), help="flat YAML file")
    parser.add_argument("--num-processes", type=int, default=1, help="processes of each stage (GPUs, or CPU processes)")
    known, rest = parser.parse_known_args(argv)
    config = {"output": "runs", "experiment": Path(known.config).stem, **read_config(known.config), **overrides(rest)}
    values_for("train", config, where="the flags")
    run = Path(config["output"], config["experiment"])
    run.mkdir(parents=True, exist_ok=True)
    path = run / "config.yaml"
    same_config(path, config)
    begin = time.perf_counter()

    if not (run / "supernet.safetensors").exists():
        launch(known.num_processes, "train.py", "-c", path, "--resume")
    if not (run / "search.json").exists():
        launch(known.num_processes, "search.py", run, "-c", path)
    networks = json.loads((run / "search.json").read_text(encoding="utf-8"))["networks"]
    for entry in networks:
        if not (run / "exported" / entry["name"]).exists():
            launch(known.num_processes, "finetune.py", run, "-c", path, "--network", entry["name"], "--resume")

    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    check_exported(run, path, results)
    table = make_table(networks, results)
    write_text(run / "table.md", table)
    print(f"\n{table}\nThe whole road took {time.perf_counter() - begin:.0f} s. Results: {run}")


def overrides(flags: Sequence[str]) -> dict[str, Any]:
    """`--train-epochs 3 --budgets macs=40% macs=20% --pretrained` as configuration values."""
    config: dict[str, Any] = {}
    key = None
    for flag in flags:
        if flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            key = name.replace("-", "_")
            config[key] = [yaml.safe_load(value)] if equals else []
        elif key is None:
            raise ConfigError(f"{flag!r} is no flag: keys are given as --key value.")
        else:
            config[key].append(yaml.safe_load(flag))
    return {key: True if not values else values[0] if len(values) == 1 else values for key, values in config.items()}


def same_config(path: Path, config: dict[str, Any]) -> None:
    """Keep the configuration in the run folder; a finished stage must not be taken for one of other settings."""
    if path.is_file():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in before.keys() | config.keys() if before.get(key) != config.get(key))
        if changed:
            raise ConfigError(
                f"{path.parent} was begun with other settings ({', '.join(changed)}): give the same ones to go on, "
                "or another --experiment."
            )
    write_text(path, yaml.safe_dump(config, sort_keys=False))


def launch(processes: int, recipe: str, *arguments: object) -> None:
    """Run one recipe as its own command, through Accelerate's launcher where there are several processes."""
    command = [sys.executable]
    environment = dict(os.environ)
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
        if not torch.cuda.is_available():
            environment["ACCELERATE_USE_CPU"] = "true"  # the launcher's own --cpu runs a single process, silently
    command += [str(HERE / recipe), *map(str, arguments)]
    print(f"\n$ {' '.join(command)}", flush=True)
    done = subprocess.run(command, env=environment)
    if done.returncode:
        raise SystemExit(f"recipes/{recipe} failed; once that is mended, give the same command again to go on.")


def check_exported(run: Path, config: Path, results: dict[str, Any]) -> None:
    """Load every exported folder through timm and test it again: the accuracy must be what was reported."""
    args = read_args(run, parse_args("finetune", None, [str(run), "-c", str(config)]))
    accelerator = make_accelerator(args)
    loader = accelerator.prepare(plain_loader(args, open_images(args).test))
    for name, result in results.items():
        again = timm.create_model(f"local-dir:{run / 'exported' / name}", pretrained=True).to(accelerator.device)
        top1 = evaluate(accelerator, again, loader)["top1"]
        # Other kernels may run on other batches of other devices: a few images may change sides, no more.
        if abs(top1 - result["top1"]) > 0.1:
            raise ArtifactError(f"{run}/exported/{name} has {top1:.2f} % on the test set, not {result['top1']:.2f} %.")
        print(f"loaded again: {name} {top1:.2f} %")


def make_table(networks: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """Searched and uniform networks of each budget, side by side."""
    rows = ["| budget | network | MACs | params | test top-1 |", "|---|---|---|---|---|"]
    for entry in networks:
        result = results[entry["name"]]
        rows.append(
            f"| {entry['unit']} {entry['asked']} | {entry['kind']} | {entry['macs'] / 1e6:.2f}M | "
            f"{entry['params'] / 1e6:.3f}M | {result['top1']:.2f} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    command(main)
