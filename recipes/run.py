"""All stages with one command: train a supernet, search, fine-tune the networks, export, load again, compare.

    python -m timm_autoslim all        # or, in the repository: python recipes/run.py
    python -m timm_autoslim all data/cifar10 -c cifar10_resnet --num-processes 1

Any key of the configuration may be given as a flag too, prefixes included: --train-epochs 3 --budgets macs=40%.
Each stage is an ordinary command that is printed before it runs; finished stages are skipped when the same command is
given again, so an interrupted run goes on where it stopped. The run folder then holds table.md besides what each
recipe leaves there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

import timm_autoslim  # noqa: F401  (registers the exported models with timm)
from timm_autoslim import Accuracy, files, write_amount
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.comparison import check_accuracy
from timm_autoslim.recipes.lib.configuration import check_config, parse_args, pick_values, read_config
from timm_autoslim.recipes.lib.images import open_images
from timm_autoslim.recipes.lib.loaders import make_evaluation_loader
from timm_autoslim.recipes.lib.networks import is_searched, read_networks
from timm_autoslim.recipes.lib.ownership import own_folder
from timm_autoslim.recipes.lib.parser import Parser
from timm_autoslim.recipes.lib.processes import make_accelerator
from timm_autoslim.recipes.lib.run_folder import SUPERNET, read_args
from timm_autoslim.recipes.lib.settings import check_same, describe_left_out, find_left_out, write_settings
from timm_autoslim.recipes.lib.shell import run_command
from timm_autoslim.recipes.lib.validation import evaluate

RECIPES = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "-c", "--config", help="flat YAML file, or the name of one of the recipes'; digits if not given"
    )
    parser.add_argument("--num-processes", type=int, default=1, help="processes of each stage (GPUs, or CPU processes)")
    args, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-"):  # as in timm's scripts
        rest[:1] = ["--data-dir", rest[0]]
    flags, file = read_flags(rest), args.config or "digits"
    config = {"output": "runs", "experiment": Path(file).stem, **read_file(file, flags), **flags}
    check_config(config, where="the flags")
    values = pick_values("train", config)
    run = Path(values["output"], values["experiment"] or Path(file).stem)
    with own_folder(run, lock=".run.lock"):  # the stages own the folder itself
        run_stages(run, take_left_out(run, config, config if args.config else flags), args.num_processes)


def run_stages(run: Path, config: dict[str, Any], processes: int) -> None:
    """Run the stages that are not finished, then load and compare the networks."""
    path = run / "config.yaml"
    check_same(path, config, has_begun(run))
    write_settings(path, config)
    begin = time.perf_counter()

    if not (run / SUPERNET).exists():
        launch(processes, "train.py", "-c", path, "--resume")
    if not is_searched(run):
        launch(processes, "search.py", run, "-c", path)
    networks = read_networks(run)
    for name, network in networks.items():
        result = Accuracy.load(run / "exported" / name)
        if not result or result.widths != network.widths.to_dict():
            launch(processes, "finetune.py", run, "-c", path, "--network", name, "--resume")

    results = sort_results(networks, Accuracy.load_run(run))
    check_exported(run, path, results)
    table = make_table(results)
    files.write_text(run / "table.md", table)
    print(f"\n{table}\nAll stages took {time.perf_counter() - begin:.0f} s. Results: {run}")


def has_begun(run: Path) -> bool:
    """Whether work was done that other settings would not fit."""
    return any((run / name).exists() for name in (SUPERNET, "checkpoints"))


def read_file(path: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Read a configuration, without what a flag of the command line replaces: that of a single stage as well."""
    stages = ("train", "search", "finetune")
    replaced = {f"{stage}_{flag}" for stage in stages for flag in flags}
    return {key: value for key, value in read_config(path).items() if key not in replaced}


def take_left_out(run: Path, config: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that goes on: what was left out is as before, and is told."""
    left_out = find_left_out(run / "config.yaml", {"output", "experiment", *flags}) if has_begun(run) else {}
    changes = {key: value for key, value in left_out.items() if config.get(key) != value}
    if changes:
        print(describe_left_out(changes), flush=True)
    return {**config, **left_out}


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Read `--train-epochs 3 --budgets macs=40% macs=20% --pretrained` as values of the configuration.

    Raises:
        ConfigError: a value stands before the first flag.
    """
    config: dict[str, Any] = {}
    key = None
    for flag in flags:
        if flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            key = name.replace("-", "_")
            config[key] = [_read_value(value)] if equals else []
        elif key is None:
            raise ConfigError(f"{flag!r} is no flag: keys are given as --key value.")
        else:
            config[key].append(_read_value(flag))
    return {key: True if not values else values[0] if len(values) == 1 else values for key, values in config.items()}


def _read_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # such as @name, which is text on a command line
        return text


def launch(processes: int, recipe: str, *arguments: object) -> None:
    """Run one recipe as a command of its own, through Accelerate's launcher where there are several processes."""
    command = [sys.executable]
    environment = dict(os.environ)
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
        if not torch.cuda.is_available():
            environment["ACCELERATE_USE_CPU"] = "true"  # the launcher's own --cpu runs a single process, silently
    command += [str(RECIPES / recipe), *map(str, arguments)]
    print(f"\n$ {' '.join(command)}", flush=True)
    if subprocess.run(command, env=environment).returncode:
        raise SystemExit(f"recipes/{recipe} failed; once that is mended, give the same command again to go on.")


def check_exported(run: Path, config: Path, names: Iterable[str]) -> None:
    """Load every exported folder through timm and test it again.

    Raises:
        ArtifactError: it has another accuracy than before.
    """
    args = read_args(run, parse_args("finetune", None, [str(run), "-c", str(config)]))
    accelerator = make_accelerator(args)
    images = open_images(args)
    loader = accelerator.prepare(make_evaluation_loader(args, images.test))
    for name in names:
        model = timm.create_model(f"local-dir:{run / 'exported' / name}", pretrained=True).to(accelerator.device)
        top1 = evaluate(accelerator, model, loader)["top1"]
        check_accuracy(run / "exported" / name, top1, len(images.test))
        print(f"loaded again: {name} {top1:.2f} %")


def sort_results(networks: Iterable[str], results: dict[str, Accuracy]) -> dict[str, Accuracy]:
    """Return the results in the order of the networks, budget by budget; those of earlier searches come last."""
    return {name: results[name] for name in dict.fromkeys([*networks, *results])}


def make_table(results: dict[str, Accuracy]) -> str:
    """Return a table of the networks, one line each."""
    rows = ["| budget | network | MACs | params | test top-1 |", "|---|---|---|---|---|"]
    for row in results.values():
        rows.append(
            f"| {row.budget.replace('<=', ' ')} | {row.method} | {write_amount(row.macs, 2)} | "
            f"{write_amount(row.params, 3)} | {row.top1:.2f} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    run_command(main)
