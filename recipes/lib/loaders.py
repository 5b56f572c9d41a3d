"""Timm's loaders over images, and images loaded once into memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import DataLoader

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.image_sources import Subset
from timm_autoslim.recipes.lib.texts import write_count


def make_training_loader(args: argparse.Namespace, source: Any, indices: Sequence[int]) -> DataLoader[Any]:
    """Make timm's training loader over some images of a source; Accelerate shuffles and shards it.

    Raises:
        DataError: the images do not fill a batch.
    """
    if len(indices) < args.batch_size:
        raise DataError(f"{len(indices)} training images do not fill a batch of {args.batch_size}: lower --batch-size.")
    loader: DataLoader[Any] = create_loader(
        Subset(source, args.num_classes, indices, args.seed), is_training=True, scale=args.scale, ratio=args.ratio,
        hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter, auto_augment=args.aa, re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount,
        **_choose_options(args) | {"interpolation": args.train_interpolation or args.interpolation},
    )  # fmt: skip
    return loader


def make_evaluation_loader(
    args: argparse.Namespace, source: Any, indices: Sequence[int] | None = None
) -> DataLoader[Any]:
    """Make timm's evaluation loader, without augmentation, over some images of a source, or all of them."""
    subset = Subset(source, args.num_classes, indices)
    loader: DataLoader[Any] = create_loader(
        subset, is_training=False, crop_pct=args.crop_pct, crop_mode=args.crop_mode, **_choose_options(args)
    )
    return loader


def _choose_options(args: argparse.Namespace) -> dict[str, Any]:
    # Accelerate's prepare() shards and moves batches; timm's prefetcher would pass through it untouched.
    # Workers start anew each epoch, so that their random numbers depend on the epoch alone.
    return {
        "input_size": (args.in_chans, args.img_size, args.img_size), "batch_size": args.batch_size,
        "interpolation": args.interpolation, "mean": args.mean, "std": args.std, "num_workers": args.workers,
        "distributed": False, "use_prefetcher": False, "persistent_workers": False,
        "pin_memory": torch.cuda.is_available(),
    }  # fmt: skip


def load_batches(
    args: argparse.Namespace, source: Any, indices: Sequence[int], accelerator: Accelerator
) -> list[tuple[Tensor, Tensor]]:
    """Load images once, onto the device, in batches of nearly equal size: inputs (N, C, H, W) and targets (N,).

    None has one image alone, of which a BatchNorm may get a single value per channel, if there are two images.
    """
    loader = make_evaluation_loader(args, source, indices)
    inputs, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    if args.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    count = min(-(-len(inputs) // args.batch_size), max(1, len(inputs) // 2))
    pairs = zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True)
    return [(images.to(accelerator.device), labels.to(accelerator.device)) for images, labels in pairs]


def take_share(indices: Sequence[int], accelerator: Accelerator) -> list[int]:
    """Return this process's share of some images: as many as each other process has; a rest is left out."""
    count = len(indices) // accelerator.num_processes
    return list(indices[accelerator.process_index * count :][:count])


def load_calibration_batches(
    args: argparse.Namespace, source: Any, indices: Sequence[int], accelerator: Accelerator
) -> list[Tensor]:
    """Load this process's share of --calibration-images, without augmentation; all processes get as many batches.

    Raises:
        DataError: there are too few images for a batch of two in every process.
    """
    used, processes = list(indices[: args.calibration_images]), accelerator.num_processes
    if args.calibration_images < 1 or len(used) < 2 * processes:
        raise DataError(
            f"--calibration-images {args.calibration_images}: {len(used)} images do not measure a BatchNorm in "
            f"{write_count(processes, 'process', 'processes')}, which needs two in each and should have hundreds."
        )
    return [inputs for inputs, _ in load_batches(args, source, take_share(used, accelerator), accelerator)]
