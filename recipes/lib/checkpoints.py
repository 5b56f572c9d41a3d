"""Checkpoints of a training: written in full or not at all, checked when they are read, and never the only one lost."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from timm_autoslim import files
from timm_autoslim.errors import AutoSlimError
from timm_autoslim.recipes.lib.run_folder import hash_file, read_weights, write_json, write_weights

FORMAT = 4
PROGRESS = "progress.json"
OPTIMIZER = "optimizer.pt"
EMA = "ema.safetensors"
MODEL = "model.safetensors"


class CheckpointError(AutoSlimError, RuntimeError):
    """No checkpoint of a run can be read."""


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: the epoch that is trained now, from 0.
        updates: optimizer steps done in it.
        total: optimizer steps done in all.
        sums, counts: of each recorded loss in this epoch, over the steps that had it.
        metrics: of the last epoch that ended.
    """

    epoch: int = 0
    updates: int = 0
    total: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Return the mean of each loss over the steps that had it."""
        return {name: self.sums[name] / count for name, count in self.counts.items()}


@dataclass(frozen=True)
class Checkpoint:
    """What the progress.json of a checkpoint says.

    Attributes:
        path: the folder.
        progress: how far the training was.
        identity: what a resumed run must have in common with this one.
        flags: the flags of the run, and how many processes it had.
    """

    path: Path
    progress: Progress
    identity: dict[str, Any]
    flags: dict[str, Any]


class Checkpoints:
    """RUN/checkpoints/update-NNNNNNNN: model, moving average, optimizer and progress after so many updates.

    A checkpoint is written under another name, forced to the disk, and renamed, so a folder of this name is complete.
    Its progress.json holds the size and the SHA-256 of every other file, so that damage done later is noticed.
    """

    def __init__(self, run: Path, history: int) -> None:
        self.folder, self.history = run / "checkpoints", history

    def list_paths(self) -> list[Path]:
        """Return the folders of all checkpoints, the oldest first."""
        return sorted(self.folder.glob("update-*")) if self.folder.is_dir() else []

    def save(
        self, progress: Progress, identity: dict[str, Any], flags: dict[str, Any], model: nn.Module,
        optimizer: Optimizer, ema: ModelEmaV3 | None, scaler: Any,
    ) -> None:  # fmt: skip
        """Write everything that the next step needs, then drop all but the last `history` checkpoints."""
        target, part = self.folder / f"update-{progress.total:08d}", self.folder / "part"
        for leftover in (part, *self.folder.glob("old-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir(parents=True)
        write_weights(part / MODEL, model)
        if ema:
            write_weights(part / EMA, ema.module)
        states = {"optimizer": optimizer.state_dict()} | ({"scaler": scaler.state_dict()} if scaler else {})
        torch.save(states, part / OPTIMIZER)
        files.sync_to_disk(part / OPTIMIZER)
        fingerprints = {path.name: _fingerprint(path) for path in sorted(part.iterdir())}
        write_json(part / PROGRESS, {
            "format": FORMAT, "files": fingerprints, "progress": dataclasses.asdict(progress), "identity": identity,
            "flags": flags,
        })  # fmt: skip
        files.sync_to_disk(part)
        os.replace(part, target)
        files.sync_to_disk(self.folder)
        for path in self.list_paths()[: -self.history]:
            self._drop(path)

    def _drop(self, path: Path) -> None:
        # Renamed first: a folder that is half removed must not look like a checkpoint.
        old = path.with_name(f"old-{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        shutil.rmtree(old)

    def find_newest(self) -> Checkpoint | None:
        """Return the last intact checkpoint, or None if there is none; damaged ones after it are named and put aside.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        damages = []
        for path in reversed(self.list_paths()):
            try:
                checkpoint = read_checkpoint(path)
            except CheckpointError as error:
                damages.append(str(error))
                continue
            for text in damages:
                print(f"{text} Going on from {path.name}.", flush=True)
            for later in self.list_paths():
                if later > path:
                    aside = later.with_name(f"damaged-{later.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(later, aside)
            return checkpoint
        if damages:
            raise CheckpointError(
                f"{' '.join(damages)} No other checkpoint is left in {self.folder}: start another --experiment, or "
                "remove that folder to start this one again."
            )
        return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the progress of one checkpoint, and check its other files.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    try:
        content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f"The checkpoint {path} is of another version of train.py.")
        fingerprints = dict(content["files"])
        progress = Progress(**content["progress"])
        checkpoint = Checkpoint(path, progress, dict(content["identity"]), dict(content["flags"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: {PROGRESS} cannot be read ({error}).") from error
    for name, expected in fingerprints.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"The checkpoint {path} is damaged: {name} is missing.")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"The checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, not {expected['bytes']}."
            )
        if _fingerprint(file) != expected:
            raise CheckpointError(f"The checkpoint {path} is damaged: {name} has changed since it was written.")
    return checkpoint


def restore(path: Path, model: nn.Module, optimizer: Optimizer, ema: ModelEmaV3 | None, scaler: Any) -> None:
    """Load one checkpoint that was checked. The flags' learning rate and weight decay win over the saved ones."""
    read_weights(path / MODEL, model)
    if ema:
        read_weights(path / EMA, ema.module)
    states = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    rates = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(states["optimizer"])
    for group, of_flags in zip(optimizer.param_groups, rates, strict=True):
        group.update(of_flags)  # so that a run may go on with a lower --lr, with or without a schedule
    if scaler and "scaler" in states:
        scaler.load_state_dict(states["scaler"])


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}
