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
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from checkpoints import Checkpoints
from common import command, make_supernet, make_teacher, parse_args, write_args, write_weights
from data import calibration_batches, open_images, plain_loader, split_training, training_loader
from loop import Backward, Trainer, check_training, make_loss
from processes import make_accelerator, synchronize_norms
from starting import check_starting_flags, order_channels, start_model, starting_point
from torch import Tensor, nn
from validation import Validation, check_batch, subnets

from timm_autoslim import SearchSpace, Supernet, Widths, sandwich_step
from timm_autoslim.errors import ConfigError, DataError, OutputExistsError
from timm_autoslim.training.distillation import adaptive_alpha_divergence, soft_cross_entropy
from timm_autoslim.training.sandwich import resize_images

DISTILL = {"kl": soft_cross_entropy, "alpha": adaptive_alpha_divergence}


def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    args = parse_args("train", __doc__, argv)
    check_flags(args)
    run = Path(args.output, args.experiment or args.model.replace("/", "-"))
    accelerator = make_accelerator(args, run)
    precision = accelerator.mixed_precision.replace("no", "fp32")
    accelerator.print(f"{accelerator.num_processes} process(es) on {accelerator.device}, {precision}")

    begun = [name for name in ("supernet.safetensors", "checkpoints") if (run / name).exists()]
    if begun and not args.resume:
        raise OutputExistsError(f"{run} holds a training ({begun[0]}): --resume it, or give another --experiment.")

    images = open_images(args)
    args.num_classes = images.num_classes
    set_seed(args.seed)
    going_on = bool(args.resume and Checkpoints(run, args.checkpoint_hist).names())  # the weights are in a checkpoint
    supernet = make_supernet(args, None if going_on else start_model(args)).to(accelerator.device)
    if args.channels_last:
        supernet.to(memory_format=torch.channels_last)
    if args.sync_bn:
        synchronize_norms(accelerator, supernet.model)
    space, plain = supernet.space, supernet.model
    subnets(space, args.val_widths)  # refuses what is out of range
    example = torch.zeros(args.batch_size, args.in_chans, args.img_size, args.img_size, device=accelerator.device)
    check_batch(plain, lambda images: supernet(images, space.min()), example, accelerator.num_processes)
    check_sizes(args, supernet, example)
    with accelerator.main_process_first():
        run.mkdir(parents=True, exist_ok=True)
        training, held_out = split_training(args, len(images.train), run)
    if not held_out:
        raise DataError("--held-out 0 leaves no images to search on: give a share or a number of the training images.")
    if args.order and not going_on:
        looked_at = plain_loader(args, images.train, training[: args.order_images])
        batches = (tuple(t.to(accelerator.device) for t in batch) for batch in looked_at)
        order_channels(supernet, args.order, torch.nn.functional.cross_entropy, batches)
    trainer = Trainer(accelerator, args, run, {
        "model": args.model, "num_classes": args.num_classes, "in_chans": args.in_chans,
        "training_images": len(training), "limit_train": args.limit_train, "held_out": args.held_out,
        "val_widths": args.val_widths,  # which are columns of summary.csv
        **starting_point(args),
        "widths": {group.name: list(group.choices) for group in space.groups},
    })  # fmt: skip
    if accelerator.is_main_process:
        write_args(run, args)
    accelerator.print(f"{args.model}: {len(training)} training and {len(held_out)} held-out images\n{space}")

    teacher = None
    if args.teacher:
        teacher = make_teacher(args).to(accelerator.device)
        if args.channels_last:
            teacher.model.to(memory_format=torch.channels_last)
    sandwich = Sandwich(accelerator, args, space, teacher)
    calibration = calibration_batches(args, images.train, training, accelerator)
    validation = Validation(accelerator, args, supernet, calibration, plain_loader(args, images.train, held_out))
    trainer.fit(
        supernet, plain, training_loader(args, images.train, training), sandwich, validation,
        begin=sandwich.begin, describe=sandwich.describe,
    )  # fmt: skip
    if accelerator.is_main_process:
        write_weights(run / "supernet.safetensors", plain)
        print(f"Supernet: {run / 'supernet.safetensors'}")
    accelerator.end_training()


def check_flags(args: argparse.Namespace) -> None:
    """Refuse values that cannot be, before any work is done.

    Raises:
        ConfigError: a number is out of range, or two flags contradict each other.
    """
    check_training(args)
    if args.sandwich < 2:
        raise ConfigError(
            f"--sandwich {args.sandwich}: the widest and the narrowest are always trained: give 2 or more."
        )
    check_starting_flags(args)
    if any(side < 1 for side in args.subnet_sizes):
        raise ConfigError(f"--subnet-sizes {args.subnet_sizes}: needed sides of images, in pixels.")
    if not 0 <= args.sandwich_delay < 1:
        raise ConfigError(f"--sandwich-delay {args.sandwich_delay}: needed a share of the steps, from 0 to below 1.")
    if not 0 < args.distill_temperature < float("inf"):
        raise ConfigError(f"--distill-temperature {args.distill_temperature}: needed a number above 0.")
    if not 0 <= args.teach_widest <= 1:
        raise ConfigError(f"--teach-widest {args.teach_widest}: needed a share from 0 to 1.")
    if args.teach_widest and not args.teacher:
        raise ConfigError("--teach-widest needs an outside --teacher: the widest cannot teach itself.")
    if args.distill_teacher == "ema" and not args.model_ema:
        raise ConfigError("--distill-teacher ema needs the moving average: add --model-ema.")
    if args.distill_teacher == "ema" and args.teacher:
        raise ConfigError("--distill-teacher ema and --teacher are two teachers: give one of them.")


def check_sizes(args: argparse.Namespace, supernet: Supernet, images: Tensor) -> None:
    """Make sure that the model takes images (N, C, H, W) of all --subnet-sizes.

    Raises:
        ConfigError: it does not.
    """
    training = supernet.training
    supernet.eval()
    try:
        for side in args.subnet_sizes:
            try:
                with torch.no_grad():
                    supernet(resize_images(images[:1], side), supernet.space.min())
            except Exception as error:  # whatever a forward raises
                raise ConfigError(
                    f"--subnet-sizes {side}: {args.model} does not take such images: {error} Give sizes that it takes; "
                    "many transformers take one size, or --model-kwargs dynamic_img_size=True."
                ) from error
    finally:
        supernet.train(training)


class Sandwich:
    """The supernet's training step, as the flags say."""

    def __init__(
        self, accelerator: Accelerator, args: argparse.Namespace, space: SearchSpace, teacher: nn.Module | None
    ) -> None:
        self.accelerator, self.args, self.space = accelerator, args, space
        self.loss_fn = make_loss(args)
        self.sample = {"independent": space.sample, "multiplier": space.sample_multiplier}[args.sampler]
        self.distill = functools.partial(DISTILL[args.distill_loss], temperature=args.distill_temperature)
        self.teacher = self._autocast(teacher) if teacher else None
        self.delay = 0  # updates that train the widest alone

    def _autocast(self, teacher: nn.Module) -> Callable[[Tensor], Tensor]:
        def logits(inputs: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return teacher(inputs)

        return logits

    def begin(self, updates: int, ema: nn.Module | None) -> None:
        """Take what is known only when the loop is set up: its length, and the moving average as the teacher."""
        self.delay = round(self.args.sandwich_delay * updates)
        if self.args.distill_teacher == "ema" and ema:
            self.teacher = self._autocast(ema)

    def generator(self, update: int) -> torch.Generator:
        """By (seed, step): every process draws the same widths, and a resumed run those of the uninterrupted one."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + update)

    def __call__(
        self, network: nn.Module, inputs: Tensor, targets: Tensor, update: int, backward: Backward
    ) -> dict[str, Tensor | None]:
        """Add the gradients of one batch; returns the losses. All batches of an update have the same widths."""
        alone = update < self.delay
        done = sandwich_step(
            network, self.space, inputs, targets, self.loss_fn, generator=self.generator(update), n=self.args.sandwich,
            sample=self.sample, distill=self.distill, teacher=self.teacher, teach_widest=self.args.teach_widest,
            only_widest=alone, regularize_widest_only=self.args.regularize_widest_only,
            sizes=self.args.subnet_sizes,
            backward=backward, no_sync=lambda: self.accelerator.no_sync(network),
        )  # fmt: skip
        losses = {"widest_loss": done.losses[0], "narrowest_loss": None if alone else done.losses[1]}
        if len(done.losses) > 2:
            losses["random_loss"] = torch.stack(done.losses[2:])  # (n - 2,)
        return losses

    def random_widths(self, update: int) -> list[Widths]:
        """The widths of the random subnets of one update."""
        generator = self.generator(update)
        return [self.sample(generator) for _ in range(self.args.sandwich - 2)]

    def describe(self, name: str, index: int, update: int) -> str:
        """Say which subnet had a loss."""
        if name != "random_loss":
            return f"the {name.removesuffix('_loss')} subnet"
        return f"the random subnet with the widths {json.dumps(self.random_widths(update)[index].to_dict())}"


if __name__ == "__main__":
    command(main)
