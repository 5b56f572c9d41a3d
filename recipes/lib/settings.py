"""The settings of a run of several stages: kept once its work has begun, for a finished stage is of these settings.

A flag that is left out when a run goes on is as before. One that is given with another value is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from timm_autoslim import files
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.image_sources import hash_images
from timm_autoslim.recipes.lib.images import Images, open_unlabelled
from timm_autoslim.recipes.lib.run_folder import hash_file
from timm_autoslim.recipes.lib.starting_points import find_weights
from timm_autoslim.recipes.lib.texts import write_flag

FLAGS = "flags.yaml"  # of a run folder: the flags of the last call

# A run of slim.py that goes on may differ in these: they do not change the networks. Budgets may follow.
FREE = ("config", "data_dir", "output", "experiment", "run", "resume", "workers", "threads", "device", "log_interval",
        "checkpoint_hist", "log_wandb", "log_tensorboard", "wandb_project", "val_interval",
        "recovery_interval", "onnx", "unlabelled", "budgets")  # fmt: skip
# Those of them that say what is made of what: left out, they are as before too.
_REMEMBERED = ("data_dir", "unlabelled", "budgets", "onnx")
# Flags that stand for each other: with one of them the others are given as well.
_TOGETHER = (
    ("pretrained", "initial_checkpoint"), ("data_dir", "data", "dataset"), ("model_kwargs", "drop", "drop_path"),
    ("in_chans", "img_size", "input_size"),
)  # fmt: skip
_FILES = {
    "weights_sha256": "the weights (--initial-checkpoint or --model)",
    "images_sha256": "the images (DATA)",
    "unlabelled_sha256": "the images of --unlabelled",
}


def list_remembered(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that are as before when they are left out."""
    return {name: value for name, value in vars(args).items() if name not in FREE or name in _REMEMBERED}


def find_left_out(path: Path, flags: Iterable[str]) -> dict[str, Any]:
    """Return the flags of before that were left out now.

    Args:
        path: of the flags of before; they need not be there.
        flags: names of the flags of now.
    """
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = set(flags)
    for together in _TOGETHER:
        names |= set(together) if names & set(together) else set()
    return {name: value for name, value in before.items() if name not in names}


def take_left_out(args: argparse.Namespace, flags: Iterable[str], path: Path) -> str:
    """Let the flags that were left out be as before; return these in words.

    Args:
        args: the flags; they are changed.
        flags: names of those that the user gave.
        path: of the flags of before; they need not be there.
    """
    remembered = list_remembered(args)
    left_out = find_left_out(path, flags).items()
    changes = {name: value for name, value in left_out if name in remembered and remembered[name] != value}
    vars(args).update(changes)
    return describe_left_out(changes)


def describe_left_out(flags: Mapping[str, Any]) -> str:
    """Say which flags are as before; empty if there are none."""
    return f"Left out, and as before: {' '.join(map(write_flag, flags, flags.values()))}." if flags else ""


def describe_settings(path: Path, args: argparse.Namespace, images: Images) -> dict[str, Any]:
    """Return what the networks of a run follow from: its flags, and hashes of its weights and images.

    Args:
        path: of the settings of before, if there are any.
        args: the flags.
        images: the images of the run.
    """
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    # Weights are known by what is in the file, wherever it lies; and the run has them, so the file may be gone.
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    weights = find_weights(args)
    settings["weights_sha256"] = hash_file(weights) if weights else before.get("weights_sha256")
    settings.pop("initial_checkpoint")
    if args.model.startswith("local-dir:"):
        settings["model"] = "local-dir"
    settings["images_sha256"] = hash_images(images.train, images.test)
    if unlabelled := open_unlabelled(args):
        settings["unlabelled_sha256"] = hash_images(unlabelled)
    return settings


def check_same(path: Path, settings: Mapping[str, Any], begun: bool) -> bool:
    """Return whether the settings of a run are those of before.

    Args:
        path: of the settings of before, if there are any.
        settings: those of now.
        begun: whether work was done that other settings would not fit.

    Raises:
        ConfigError: the file has other settings, and the work has begun.
    """
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before is None:
        return False
    names = sorted(before.keys() | settings.keys())
    changes = [name for name in names if before.get(name) != settings.get(name)]
    if changes and begun:
        texts = "; ".join(_describe(name, before, settings) for name in changes)
        raise ConfigError(
            f"{path.parent} was begun with other settings: {texts}. To go on, give what was given before"
            ", or leave the flag out; or give another --experiment."
        )
    return not changes


def _describe(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what a setting was and is; hashes say nothing."""
    if name in _FILES:
        return f"{_FILES[name]} are other ones"
    was, is_ = (f"{values[name]}" if values.get(name) is not None else "not given" for values in (before, now))
    return f"--{name.replace('_', '-')} was {was}, and is {is_}"


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run to its folder."""
    files.write_text(path, yaml.safe_dump(dict(settings), sort_keys=False))
