"""summary.csv: one row for each epoch of a training."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from timm.utils import update_summary

from timm_autoslim import files


def write_epoch(
    path: Path, epoch: int, losses: Mapping[str, float | None], metrics: Mapping[str, float | None], rate: float
) -> None:
    """Write the row of one epoch; later rows, of a run that was interrupted after its last checkpoint, are dropped."""
    trim(path, epoch)
    update_summary(epoch, losses, metrics, path, lr=rate, write_header=epoch == 0)


def trim(path: Path, epoch: int) -> None:
    """Drop the rows from this epoch on, and a row that was written in part."""
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            head = list(itertools.islice(lines, epoch + 1 if epoch else 0))
        files.write_text(path, "".join(head))
