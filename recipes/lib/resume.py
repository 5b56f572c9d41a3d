"""Where a training begins: at its first step, or after its last checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.checkpoints import Checkpoint, Checkpoints, Progress
from timm_autoslim.recipes.lib.texts import write_flag

# A resumed run may differ in these without a word: they do not change the weights.
SILENT = ("config", "data_dir", "output", "experiment", "run", "resume", "workers", "device", "grad_checkpointing",
          "log_interval", "checkpoint_hist", "log_wandb", "log_tensorboard", "wandb_project",
          "val_interval", "unlabelled")  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Attributes:
        folder: of the training.
        checkpoints: those of the training.
        checkpoint: what it goes on from; None at its first step.
        identity: what a resumed run must have in common with the one before.
        flags: the flags of the run, and how many processes it has.
    """

    folder: Path
    checkpoints: Checkpoints
    checkpoint: Checkpoint | None
    identity: dict[str, Any]
    flags: dict[str, Any]

    @property
    def progress(self) -> Progress:
        """How far the training is."""
        return self.checkpoint.progress if self.checkpoint else Progress()


def count_images_per_update(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Return how many images one optimizer step takes, in all processes together."""
    return int(args.batch_size * accelerator.num_processes * args.grad_accum_steps)


def find_start(
    accelerator: Accelerator, args: argparse.Namespace, folder: Path, identity: Mapping[str, object]
) -> Start:
    """Find out where a training begins; to be called by every process.

    Args:
        accelerator: Accelerate's.
        args: the flags.
        folder: of the training.
        identity: what a resumed run must have in common with the one before; some flags are added.

    Raises:
        ConfigError: the run cannot go on with these flags.
        CheckpointError: all of its checkpoints are damaged.
    """
    added = {"images_per_update": count_images_per_update(accelerator, args), "opt": args.opt, "seed": args.seed,
             "model_ema": args.model_ema}  # fmt: skip
    complete = json.loads(json.dumps({**identity, **added}))
    flags = json.loads(json.dumps({**vars(args), "processes": accelerator.num_processes}))
    checkpoints = Checkpoints(folder, args.checkpoint_hist)
    checkpoint = _find_checkpoint(accelerator, checkpoints) if args.resume else None
    if checkpoint:
        check_identity(checkpoint.identity, complete, flags)
        _tell_changes(accelerator, checkpoint, flags)
    return Start(folder, checkpoints, checkpoint, complete, flags)


def _find_checkpoint(accelerator: Accelerator, checkpoints: Checkpoints) -> Checkpoint | None:
    with accelerator.main_process_first():  # which puts damaged checkpoints aside
        checkpoint = checkpoints.find_newest()
    total = checkpoint.progress.total if checkpoint else 0
    totals = accelerator.gather(torch.tensor([total], device=accelerator.device)).tolist()
    if len(set(totals)) > 1:
        raise ConfigError(
            f"The processes find checkpoints of different ages in {checkpoints.folder} (updates {totals}): --output "
            "must lie on a disk that all machines share."
        )
    return checkpoint


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], flags: Container[str] = ()) -> None:
    """Make sure that a resumed run is the one that it was.

    Args:
        before: what it must have in common with now.
        now: the same of now.
        flags: names of those that are flags.

    Raises:
        ConfigError: something that cannot change in the middle of a training has changed.
    """
    for name, value in now.items():
        if before.get(name) == value:
            continue
        first, second = before.get(name), value
        if isinstance(first, dict) and isinstance(second, dict):  # widths by group
            names = [key for key in {**first, **second} if first.get(key) != second.get(key)]
            name = f"{name} of {names[0]}" + (f" (and of {len(names) - 1} more)" if names[1:] else "")
            first, second = first.get(names[0]), second.get(names[0])
        flag = f"leave out --{name.replace('_', '-')}" if first is None else f"give {write_flag(name, first)}"
        advice = f"{flag if name in flags else 'give the same'} as before, or start another --experiment"
        if name == "images_per_update":
            advice = f"--batch-size x processes x --grad-accum-steps must stay {first}"
        raise ConfigError(f"--resume: this run was begun with {name} {first}, and now it is {second}: {advice}.")


def _tell_changes(accelerator: Accelerator, checkpoint: Checkpoint, flags: Mapping[str, Any]) -> None:
    before = checkpoint.flags
    accelerator.print(f"Going on from {checkpoint.path.name} (epoch {checkpoint.progress.epoch + 1})")
    changes = [name for name, value in flags.items() if name not in SILENT and before.get(name) != value]
    if changes:
        text = ", ".join(f"{name} {flags[name]} (was {before.get(name)})" for name in changes)
        accelerator.print(f"Changed since: {text}. The result is not that of the uninterrupted run.")
