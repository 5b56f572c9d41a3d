"""The flags of the recipes that train: optimizer, augmentation, distillation, checkpoints."""

from __future__ import annotations

import argparse

from timm_autoslim import DISTILLATION_LOSSES
from timm_autoslim.recipes.lib.parser import ON_OFF, KeyValues, share


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """Flags about the optimizer and its learning rate, of the recipes that train."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="sgd", help="a timm optimizer")
    group.add_argument("--opt-eps", type=float, help="as the optimizer has it if not given")
    group.add_argument("--opt-betas", type=float, nargs="+", help="as the optimizer has it if not given")
    group.add_argument("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=2e-5)
    group.add_argument("--layer-decay", type=float, help="factor of the learning rate from one layer to that before it")
    group.add_argument(
        "--clip-grad", type=float, help="limit of the gradients, which are clipped once an update; 0: none"
    )
    group.add_argument("--clip-mode", choices=("norm", "value", "agc"), default="norm")
    group.add_argument(
        "--grad-accum-steps", type=int, default=1, help="batches in one update; all of them train the same subnets"
    )
    group = parser.add_argument_group("learning rate schedule")
    group.add_argument("--epochs", type=int, default=300)
    group.add_argument("--lr", type=float, help="learning rate; overrides --lr-base")
    group.add_argument("--lr-base", type=float, default=0.1, help="learning rate at --lr-base-size images an update")
    group.add_argument("--lr-base-size", type=int, default=256)
    group.add_argument(
        "--lr-base-scale",
        choices=("linear", "sqrt"),
        help="how --lr-base grows with the images of an update; by default sqrt for adaptive optimizers, else linear",
    )
    group.add_argument("--sched", default="cosine", help="a timm scheduler")
    group.add_argument("--warmup-epochs", type=float, default=0)
    group.add_argument("--warmup-lr", type=float, default=1e-5)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--decay-epochs", type=float, default=90, help="interval of the step schedule")
    group.add_argument("--decay-rate", type=float, default=0.1, help="factor of step, exponent of poly")


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags about augmentation and regularization, of the recipes that train."""
    group = parser.add_argument_group("augmentation and regularization")
    group.add_argument("--scale", type=share, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect of the random crop")
    group.add_argument("--train-interpolation", help="how training images are resized, or random; as --interpolation")
    group.add_argument("--hflip", type=float, default=0.5)
    group.add_argument("--vflip", type=float, default=0.0)
    group.add_argument("--color-jitter", type=float, default=0.4)
    group.add_argument("--aa", help="timm's AutoAugment policy, such as rand-m9-mstd0.5")
    group.add_argument("--reprob", type=float, default=0.0, help="probability of random erasing")
    group.add_argument("--remode", default="pixel", help="mode of random erasing")
    group.add_argument("--recount", type=int, default=1, help="count of random erasing")
    group.add_argument("--mixup", type=float, default=0.0)
    group.add_argument("--cutmix", type=float, default=0.0)
    group.add_argument("--mixup-prob", type=float, default=1.0, help="probability of mixup or cutmix")
    group.add_argument("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix if both are on")
    group.add_argument("--mixup-off-epoch", type=int, default=0, help="turn them off after this epoch; 0: never")
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """All other flags of the recipes that train: statistics, moving average, checkpoints, curves."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--grad-checkpointing", action=ON_OFF, default=False, help="compute activations again in the backward pass"
    )
    group = parser.add_argument_group("batch norm")
    group.add_argument("--sync-bn", action=ON_OFF, default=False, help="statistics over the batches of all processes")
    group.add_argument("--calibration-images", type=int, default=2048, help="training images that calibrate BatchNorm")
    group = parser.add_argument_group("model exponential moving average")
    group.add_argument(
        "--model-ema", action=ON_OFF, default=False, help="keep a moving average of the weights, which is the result"
    )
    group.add_argument("--model-ema-decay", type=float, default=0.9998)
    group = parser.add_argument_group("checkpoints and tracking")
    group.add_argument("--resume", action=ON_OFF, default=False, help="go on from the last checkpoint")
    group.add_argument(
        "--recovery-interval",
        type=int,
        default=0,
        help="updates between checkpoints within an epoch; 0: only after each epoch",
    )
    group.add_argument("--checkpoint-hist", type=int, default=2, help="how many checkpoints stay")
    group.add_argument("--val-interval", type=int, default=1, help="epochs between validations")
    group.add_argument(
        "--log-interval",
        type=int,
        default=20,
        help="updates between checks of the loss, which are also the points of the curves",
    )
    group.add_argument("--log-tensorboard", action=ON_OFF, default=False, help="curves in RUN/tensorboard")
    group.add_argument("--log-wandb", action=ON_OFF, default=False, help="curves at Weights & Biases")
    group.add_argument("--wandb-project", default="timm-autoslim", help="project of --log-wandb")


def add_teacher(group: argparse._ArgumentGroup, help: str) -> None:
    """Flags of the recipes that distill: which model teaches (`help` says what it may be), and its loss."""
    group.add_argument("--teacher", "--kd-model-name", metavar="NAME", help=help)
    group.add_argument(
        "--teacher-kwargs", "--kd-model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE"
    )
    group.add_argument(
        "--distill-loss",
        choices=list(DISTILLATION_LOSSES),
        default="kl",
        help="cross-entropy with soft labels, or the adaptive alpha-divergence (AlphaNet)",
    )
    group.add_argument(
        "--distill-temperature",
        "--kd-temperature",
        type=float,
        default=1.0,
        help="above 1 softens the outputs of teacher and subnet",
    )
