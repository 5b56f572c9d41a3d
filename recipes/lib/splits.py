"""Which training images train the supernet, and which are held out for the search."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.run_folder import write_json
from timm_autoslim.recipes.lib.texts import write_count

SPLIT = "held_out.json"


def split_training(
    args: argparse.Namespace, total: int, run: Path, *, anew: bool = False
) -> tuple[list[int], list[int]]:
    """Split the training images into those that train the supernet and those held out for the search.

    The split is drawn once and written to held_out.json of the run folder. Both lists are shuffled, so that any part of
    them mixes the classes. The same --limit-train and --held-out give the same split, whatever the seed. A file that is
    there is read, unless the split is to be drawn `anew`: for a training that begins, whatever an earlier one left.

    Returns:
        (training indices, held-out indices)

    Raises:
        DataError: the flags ask for no image, or leave none to train on.
    """
    if (run / SPLIT).is_file() and not anew:
        return read_split(run, total)
    used, held_out = count_split(args, total)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()[:used]
    write_json(run / SPLIT, {"total": total, "training": order[held_out:], "held_out": order[:held_out]})
    return order[held_out:], order[:held_out]


def count_split(args: argparse.Namespace, total: int) -> tuple[int, int]:
    """Return how many of the training images the flags ask for, and how many of these are held out.

    Raises:
        DataError: the flags ask for no image, or leave none to train on.
    """
    used = _count(args.limit_train, total, "--limit-train")
    if used < 2:
        raise DataError(
            f"{write_count(used, 'training image')} cannot be divided: at least one is trained on, and one is held out "
            f"for the search (--limit-train {args.limit_train:g} of {total})."
        )
    held_out = _count(args.held_out, used, "--held-out") if args.held_out else 0
    if held_out >= used:
        raise DataError(
            f"--held-out {args.held_out:g} leaves none of {used} training images to train on: give a share such as "
            f"0.2 (1 is all of them), or a number between 1 and {used}."
        )
    return used, held_out


def read_split(run: Path, total: int) -> tuple[list[int], list[int]]:
    """Read the split of a run folder: (training indices, held-out indices).

    Raises:
        DataError: it was drawn from another number of images.
    """
    split = json.loads((run / SPLIT).read_text(encoding="utf-8"))
    if split["total"] != total:
        raise DataError(
            f"{run}/{SPLIT} was drawn from {split['total']} training images, but there are {total} now: "
            "give the --data-dir of that run, or start another one."
        )
    return split["training"], split["held_out"]


def read_all_training(run: Path, total: int) -> list[int]:
    """Read which training images the run uses, the held-out ones too; the final networks are trained on them all."""
    training, held_out = read_split(run, total)
    return held_out + training


def _count(amount: float, total: int, flag: str) -> int:
    """Return how many images a share (up to 1) or a number (above 1) is; a number above all is all."""
    count = round(amount * total) if amount <= 1 else min(int(amount), total)
    if count <= 0:
        raise DataError(
            f"{flag} {amount:g} of {write_count(total, 'training image')} is less than one image: needed at least one. "
            f"Give more images, or a larger share, such as {flag} {-(-100 // total) / 100:g}."
        )
    return count
