"""Curves of a training, in TensorBoard or at Weights & Biases, through Accelerate."""

from __future__ import annotations

import argparse
import importlib.util
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from timm_autoslim import files
from timm_autoslim.errors import ConfigError


def choose_trackers(args: argparse.Namespace) -> list[str]:
    """Return the names of the trackers that the flags ask for.

    Raises:
        ConfigError: one is not installed.
    """
    names = [name for name, on in (("tensorboard", args.log_tensorboard), ("wandb", args.log_wandb)) if on]
    for name in names:
        if importlib.util.find_spec(name) is None:  # Accelerate would leave it out without a word
            raise ConfigError(f"--log-{name}: {name} is not installed: pip install {name}.")
    return names


def start_trackers(accelerator: Accelerator, args: argparse.Namespace, folder: Path, total: int) -> None:
    """Open the trackers; those of a resumed run go on after `total` updates."""
    if not accelerator.log_with:
        return
    path = folder / "wandb_id.txt"  # so that a resumed run goes on with its curves
    if accelerator.is_main_process and args.log_wandb and not path.is_file():
        files.write_text(path, uuid.uuid4().hex[:16])
    accelerator.wait_for_everyone()
    settings: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": total + 1}}  # drops what was logged later
    if args.log_wandb:
        settings["wandb"] = {"id": path.read_text(encoding="utf-8"), "name": folder.name, "dir": str(folder),
                             "resume": "allow", "config": vars(args)}  # fmt: skip
    accelerator.init_trackers(args.wandb_project, init_kwargs=settings)
