"""Train a slimmable supernet by the sandwich rule, with in-place distillation.

    python recipes/train.py -c recipes/configs/digits.yaml --output runs --experiment digits
    accelerate launch --multi_gpu --num_processes 8 recipes/train.py -c recipes/configs/imagenet_resnet50.yaml \\
        --data-dir /data/imagenet

The run folder (OUTPUT/EXPERIMENT) then holds args.yaml, held_out.json (which training images the search may use),
summary.csv (losses, and accuracies of several subnets on the held-out images, after each epoch), checkpoints/ (for
--resume) and, once finished, supernet.safetensors. Test images are not touched.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from timm_autoslim import SearchSpace, Supernet
from timm_autoslim.errors import ConfigError, OutputExistsError
from timm_autoslim.recipes.lib.checkpoints import Checkpoints
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.lib.images import open_images
from timm_autoslim.recipes.lib.loaders import (
    load_calibration_batches,
    make_evaluation_loader,
    make_training_loader,
)
from timm_autoslim.recipes.lib.models import checkpoint_gradients, make_images, make_supernet, set_layout
from timm_autoslim.recipes.lib.networks import is_searched
from timm_autoslim.recipes.lib.ownership import own_folder
from timm_autoslim.recipes.lib.processes import describe_processes, make_accelerator, synchronize_norms
from timm_autoslim.recipes.lib.resume import find_start
from timm_autoslim.recipes.lib.run_folder import SUPERNET, write_args, write_weights
from timm_autoslim.recipes.lib.sandwich import Sandwich
from timm_autoslim.recipes.lib.shell import run_command
from timm_autoslim.recipes.lib.splits import split_training
from timm_autoslim.recipes.lib.starting_points import (
    check_starting_flags,
    create_starting_model,
    describe_start,
    order_by_images,
)
from timm_autoslim.recipes.lib.teacher import create_teacher
from timm_autoslim.recipes.lib.trainer import Trainer
from timm_autoslim.recipes.lib.training import prepare
from timm_autoslim.recipes.lib.validation import Validation, check_batch

AGAIN = "the same command with --resume goes on from the last checkpoint"  # after an interruption


def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    args = parse_args("train", __doc__, argv)
    check_flags(args)
    run = Path(args.output, args.experiment or args.model.replace("/", "-"))
    accelerator = make_accelerator(args, run)
    precision = accelerator.mixed_precision.replace("no", "fp32")
    accelerator.print(f"{describe_processes(accelerator)}, {precision}")
    with own_folder(run, accelerator):
        check_earlier(run, args.resume)
        train(accelerator, args, run)
    accelerator.end_training()


def train(accelerator: Accelerator, args: argparse.Namespace, run: Path) -> None:
    """Train the supernet."""
    images = open_images(args)
    args.num_classes = images.num_classes
    set_seed(args.seed)
    resumes = bool(args.resume and Checkpoints(run, args.checkpoint_hist).list_paths())  # weights are in a checkpoint
    supernet = set_up_supernet(accelerator, args, None if resumes else create_starting_model(args))
    space = supernet.space
    with accelerator.main_process_first():
        training, held_out = split_training(
            args, len(images.train), run, anew=not resumes and accelerator.is_main_process
        )
    if args.order and not resumes:
        order_by_images(accelerator, args, supernet, images.train, training)
    start = find_start(accelerator, args, run, describe_training(args, space, len(training)))
    if is_finished(run, args, start.progress.epoch):
        accelerator.print(f"{run / SUPERNET}: this training is finished.")
        return
    if accelerator.is_main_process:
        write_args(run, args)
    accelerator.print(f"{args.model}: {len(training)} training and {len(held_out)} held-out images\n{space}")

    teacher = None
    if args.teacher:
        teacher = set_layout(args, create_teacher(args).to(accelerator.device))
    calibration = load_calibration_batches(args, images.train, training, accelerator)
    validation = Validation(
        accelerator, args, supernet, calibration, make_evaluation_loader(args, images.train, held_out)
    )
    loop = prepare(
        accelerator, args, start, supernet, supernet.model, make_training_loader(args, images.train, training)
    )
    if args.distill_teacher == "ema" and loop.ema:
        teacher = loop.ema.module
    sandwich = Sandwich(accelerator, args, space, teacher=teacher, updates=loop.updates)
    Trainer(loop, sandwich, validation, sandwich.describe).fit()
    if accelerator.is_main_process:
        write_weights(run / SUPERNET, supernet.model)
        print(f"Supernet: {run / SUPERNET}")


def describe_training(args: argparse.Namespace, space: SearchSpace, images: int) -> dict[str, Any]:
    """Return what a training must have begun with, to be resumed: names, and values that JSON can hold."""
    return {
        "model": args.model, "num_classes": args.num_classes, "in_chans": args.in_chans,
        "training_images": images, "limit_train": args.limit_train, "held_out": args.held_out,
        "val_widths": args.val_widths,  # which are columns of summary.csv
        **describe_start(args),
        "widths": {group.name: list(group.choices) for group in space.groups},
    }  # fmt: skip


def is_finished(run: Path, args: argparse.Namespace, epochs: int) -> bool:
    """Whether a training that has come to this many epochs is finished.

    Raises:
        OutputExistsError: there are epochs left, but its supernet was searched already.
    """
    if not (run / SUPERNET).exists():
        return False
    if epochs < args.epochs and (is_searched(run) or (run / "exported").exists()):
        raise OutputExistsError(
            f"{run} was searched with the supernet of {epochs} epochs: train for --epochs {args.epochs} in another "
            "--experiment."
        )
    return bool(epochs >= args.epochs)


def check_earlier(run: Path, resume: bool) -> None:
    """Refuse to replace what an earlier training has left.

    Raises:
        OutputExistsError: a training is there and is not to be resumed, or there is nothing to resume it from.
    """
    other = "give another --experiment"
    leftovers = [name for name in (SUPERNET, "checkpoints") if (run / name).exists()]
    if leftovers and not resume:
        raise OutputExistsError(f"{run} holds a training ({leftovers[0]}): --resume it, or {other}.")
    if SUPERNET in leftovers and not Checkpoints(run, 1).list_paths():
        raise OutputExistsError(f"{run} holds a finished training, and no checkpoints to go on from: {other}.")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before any work is done.

    Raises:
        ConfigError: two of them do.
    """
    check_starting_flags(args)
    if args.teach_widest and not args.teacher:
        raise ConfigError("--teach-widest needs an outside --teacher: the widest cannot teach itself.")
    if args.distill_teacher == "ema" and not args.model_ema:
        raise ConfigError("--distill-teacher ema needs the moving average: add --model-ema.")
    if args.distill_teacher == "ema" and args.teacher:
        raise ConfigError("--distill-teacher ema and --teacher are two teachers: give one of them.")


def set_up_supernet(accelerator: Accelerator, args: argparse.Namespace, model: nn.Module | None) -> Supernet:
    """Make the supernet on its device; what cannot be trained as the flags say is refused.

    Raises:
        ConfigError: a BatchNorm would get a single value, or a size of --subnet-sizes does not fit the model.
    """
    supernet = set_layout(args, make_supernet(args, model).to(accelerator.device))
    if args.sync_bn:
        synchronize_norms(accelerator, supernet.model)
    space = supernet.space
    images = make_images(args, args.batch_size, accelerator.device)
    check_batch(supernet.model, lambda images: supernet(images, space.min()), images, accelerator.num_processes)
    check_sizes(args, supernet, accelerator.device)
    checkpoint_gradients(supernet.model, args)
    return supernet


def check_sizes(args: argparse.Namespace, supernet: Supernet, device: torch.device) -> None:
    """Make sure that the model takes images of all --subnet-sizes.

    Raises:
        ConfigError: it does not.
    """
    training = supernet.training
    supernet.eval()
    try:
        for side in args.subnet_sizes:
            try:
                image = torch.zeros(1, args.in_chans, side, side, device=device)  # (1, C, H, W)
                with torch.no_grad():
                    supernet(image, supernet.space.min())
            except Exception as error:  # a forward may raise anything
                raise ConfigError(
                    f"--subnet-sizes {side}: {args.model} does not take such images: {error} Give sizes that it takes; "
                    "many transformers take one size, or --model-kwargs dynamic_img_size=True."
                ) from error
    finally:
        supernet.train(training)


if __name__ == "__main__":
    run_command(main, AGAIN)
