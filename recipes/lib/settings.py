"""The settings of a run of several stages: kept once its work has begun, for a finished stage is of these settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from timm_autoslim import files
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.image_sources import hash_images
from timm_autoslim.recipes.lib.images import Images, open_unlabelled
from timm_autoslim.recipes.lib.run_folder import hash_file
from timm_autoslim.recipes.lib.starting_points import find_weights

# A run of slim.py that goes on may differ in these: they do not change the networks. Budgets may follow.
FREE = ("config", "data_dir", "output", "experiment", "run", "resume", "workers", "threads", "device", "log_interval",
        "checkpoint_hist", "log_wandb", "log_tensorboard", "wandb_project", "val_interval",
        "recovery_interval", "onnx", "unlabelled", "budgets")  # fmt: skip


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
        raise ConfigError(
            f"{path.parent} was begun with other settings ({', '.join(changes)}): give the same ones to go on, "
            f"or another --experiment.{_describe(changes, before, settings)}"
        )
    return not changes


def _describe(names: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what the settings were and are, for those that a user gave: hashes say nothing."""
    texts = [f"{name} was {before.get(name)}, and is {now.get(name)}" for name in names if not name.endswith("_sha256")]
    return f" {'; '.join(texts)}." if texts else ""


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run to its folder."""
    files.write_text(path, yaml.safe_dump(dict(settings), sort_keys=False))
