"""Checkpoints of a run: written whole or not at all, checked when they are read, and never the only one lost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import read_weights, write_json, write_weights
from timm.utils import ModelEmaV3
from torch import nn

from timm_autoslim.errors import AutoSlimError, ConfigError
from timm_autoslim.utils.files import sync_to_disk

PROGRESS = "progress.json"
OPTIMIZER = "optimizer.pt"
EMA = "ema.safetensors"
MODEL = "model.safetensors"


class CheckpointError(AutoSlimError, RuntimeError):
    """No checkpoint of a run can be read."""


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds besides tensors.

    Attributes:
        epoch: the epoch that is trained now, from 0.
        updates: optimizer steps done in it.
        total: optimizer steps done in all.
        sums, counts: of each recorded loss in this epoch, over the steps that had it.
        metrics: of the last epoch that ended.
        fixed: what a resumed run must have in common with this one.
        flags: the flags of the run, and how many processes it had.
    """

    epoch: int = 0
    updates: int = 0
    total: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """RUN/checkpoints/update-NNNNNNNN: model, moving average, optimizer and progress after so many updates.

    A checkpoint is written under another name, forced to the disk, and renamed, so that a folder of this name is whole.
    Its progress.json holds the size and the SHA-256 of every other file, so that damage done later is noticed.
    """

    def __init__(self, run: Path, history: int) -> None:
        self.folder, self.history = run / "checkpoints", history

    def names(self) -> list[Path]:
        """All that are there, the oldest first."""
        return sorted(self.folder.glob("update-*")) if self.folder.is_dir() else []

    def save(self, progress: Progress, plain: nn.Module, optimizer: Any, ema: ModelEmaV3 | None, scaler: Any) -> None:
        """Keep everything that the next step needs, then drop all but the last `history` checkpoints."""
        target, part = self.folder / f"update-{progress.total:08d}", self.folder / "part"
        for leftover in (part, *self.folder.glob("old-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir(parents=True)
        write_weights(part / MODEL, plain)
        if ema:
            write_weights(part / EMA, ema.module)
        states = {"optimizer": optimizer.state_dict()} | ({"scaler": scaler.state_dict()} if scaler else {})
        torch.save(states, part / OPTIMIZER)
        sync_to_disk(part / OPTIMIZER)
        files = {path.name: _fingerprint(path) for path in sorted(part.iterdir())}
        write_json(part / PROGRESS, {"format": 3, "files": files, **dataclasses.asdict(progress)})
        sync_to_disk(part)
        os.replace(part, target)
        sync_to_disk(self.folder)
        for path in self.names()[: -self.history]:
            self._drop(path)

    def _drop(self, path: Path) -> None:
        # Renamed first: a folder that is half removed must not look like a checkpoint.
        gone = path.with_name(f"old-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone)

    def newest(self) -> tuple[Path, Progress] | None:
        """The last checkpoint that is whole; damaged ones after it are named and put aside. None if there is none.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        damaged = []
        for path in reversed(self.names()):
            try:
                progress = read_progress(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            for text in damaged:
                print(f"{text} Going on from {path.name}.", flush=True)
            for later in self.names():
                if later > path:
                    aside = later.with_name(f"damaged-{later.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(later, aside)
            return path, progress
        if damaged:
            raise CheckpointError(
                f"{' '.join(damaged)} No other checkpoint is left in {self.folder}: start another --experiment, or "
                "remove that folder to start this one again."
            )
        return None


def read_progress(path: Path) -> Progress:
    """Read and check one checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    try:
        content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        files = content.pop("files")
        if content.pop("format") != 3:
            raise CheckpointError(f"The checkpoint {path} is of another version of train.py.")
        progress = Progress(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: {PROGRESS} cannot be read ({error}).") from error
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"The checkpoint {path} is damaged: {name} is missing.")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"The checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, not {expected['bytes']}."
            )
        if _fingerprint(file) != expected:
            raise CheckpointError(f"The checkpoint {path} is damaged: {name} has changed since it was written.")
    return progress


def restore(path: Path, plain: nn.Module, optimizer: Any, ema: ModelEmaV3 | None, scaler: Any) -> None:
    """Load one checkpoint that was checked. The flags' learning rate and weight decay win over the saved ones."""
    read_weights(path / MODEL, plain)
    if ema:
        read_weights(path / EMA, ema.module)
    states = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    given = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(states["optimizer"])
    for group, flags in zip(optimizer.param_groups, given, strict=True):
        group.update(flags)  # so that a run may go on with a lower --lr, with or without a schedule
    if scaler and "scaler" in states:
        scaler.load_state_dict(states["scaler"])


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Make sure that a resumed run is the one that it was.

    Raises:
        ConfigError: something that cannot change in the middle of a training has changed.
    """
    for name, value in now.items():
        if saved.get(name) == value:
            continue
        before, after = saved.get(name), value
        if isinstance(before, dict) and isinstance(after, dict):  # widths by group
            names = [key for key in {**before, **after} if before.get(key) != after.get(key)]
            name = f"{name} of {names[0]}" + (f" (and of {len(names) - 1} more)" if names[1:] else "")
            before, after = before.get(names[0]), after.get(names[0])
        advice = "give the same as before, or start another --experiment"
        if name == "images_per_update":
            advice = f"--batch-size x processes x --grad-accum-steps must stay {before}"
        raise ConfigError(f"--resume: this run was begun with {name} {before}, and now it is {after}: {advice}.")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
