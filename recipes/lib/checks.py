"""The values of the flags are checked before any work is done: every number has a range, every name is known."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from timm.data import create_transform
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from torch import nn
from torch.optim import SGD

from timm_autoslim import LatencyTable
from timm_autoslim.errors import ConfigError, LatencyError
from timm_autoslim.recipes.lib.training import make_scheduler

SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Range:
    """Which numbers a flag takes; infinities and NaN are in no range.

    Attributes:
        low, high: the bounds.
        text: what was needed, for errors.
        above, below: whether the bounds themselves are not in the range.
        ascending: whether several numbers must not fall.
    """

    low: float
    high: float
    text: str
    above: bool = False
    below: bool = False
    ascending: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and low and high


def _at_least(low: int) -> Range:
    return Range(low, math.inf, f"{low} or more")


_FINITE = Range(-math.inf, math.inf, "finite numbers")
_POSITIVE = Range(0, math.inf, "a number above 0", above=True)
_SHARE = Range(0, 1, "a share from 0 to 1")
_PROBABILITY = Range(0, 1, "a probability from 0 to 1")
_BELOW_ONE = Range(0, 1, "a number from 0 to below 1", below=True)

# By flag. A test makes sure that no flag of numbers lacks one.
RANGES = {
    **dict.fromkeys(
        ("threads", "workers", "images", "reconstruct", "epochs", "recovery_interval", "mixup_off_epoch",
         "warmup_epochs", "warmup_lr", "lr", "lr_base", "min_lr", "weight_decay", "clip_grad", "color_jitter", "mixup",
         "cutmix", "opt_eps"),
        _at_least(0),
    ),
    **dict.fromkeys(
        ("batch_size", "candidates", "steps", "cost_batch_size", "latency_threads", "grad_accum_steps", "divisor",
         "checkpoint_hist", "log_interval", "val_interval", "lr_base_size", "num_classes", "in_chans", "img_size",
         "recount", "order_images", "calibration_images"),
        _at_least(1),
    ),
    **dict.fromkeys(("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"), _PROBABILITY),
    **dict.fromkeys(("momentum", "model_ema_decay", "smoothing", "opt_betas"), _BELOW_ONE),
    **dict.fromkeys(("decay_epochs", "decay_rate", "distill_temperature"), _POSITIVE),
    **dict.fromkeys(("drop", "drop_path"), _BELOW_ONE),
    "layer_decay": Range(0, 1, "a share above 0 and at most 1", above=True),
    "input_size": Range(1, math.inf, "three numbers: channels, height, width"),
    "crop_pct": Range(0.01, 1, "a share from 0.01 to 1"),
    "min_width": Range(0, 1, "a share above 0 and at most 1", above=True),
    "limit_train": Range(0, math.inf, "a share up to 1, or a number", above=True),
    "held_out": Range(0, math.inf, "a share up to 1, or a number: the search needs such images", above=True),
    "mean": _FINITE,
    "std": Range(0, math.inf, "numbers above 0", above=True),
    "scale": Range(0, 1, "two shares above 0 and at most 1, the smaller one first", above=True, ascending=True),
    "ratio": Range(0, math.inf, "two numbers above 0, the smaller one first", above=True, ascending=True),
    "sandwich": Range(2, math.inf, "2 or more: the widest and the narrowest are always trained"),
    "sandwich_delay": Range(0, 1, "a share of the steps, from 0 to below 1", below=True),
    "subnet_sizes": Range(1, math.inf, "sides of images, in pixels"),
    "teach": _SHARE,
    "teach_widest": _SHARE,
    "val_widths": Range(0, 1, "shares of the channels, above 0 and at most 1", above=True),
    "seed": Range(0, 2**32 - 1, f"a number from 0 to {2**32 - 1}"),
}  # fmt: skip


def check_values(args: argparse.Namespace) -> None:
    """Refuse values that a flag cannot have, whichever recipe has it; flags that were not given pass.

    Raises:
        ConfigError: a number is out of range, a name is unknown, or values contradict each other.
    """
    for flag, needed in RANGES.items():
        value = getattr(args, flag, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        in_order = not needed.ascending or values == sorted(values)
        if not in_order or not all(needed.holds(number) for number in values):
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: needed {needed.text}.")
    if getattr(args, "interpolation", None):
        _check_name("interpolation", args.interpolation, INTERPOLATIONS)
    if getattr(args, "train_interpolation", None):
        _check_name("train-interpolation", args.train_interpolation, ("random", *INTERPOLATIONS))
    for flag in ("mean", "std"):
        numbers = getattr(args, flag, None)
        if numbers is not None and len(numbers) not in (1, args.in_chans or 3):
            chans = args.in_chans or 3
            raise ConfigError(f"--{flag} {numbers}: needed one number, or one for each of --in-chans {chans}.")
    if hasattr(args, "latency_runtime"):
        _check_latency(args)
    if hasattr(args, "opt"):
        _check_optimizer(args)
        _check_schedule(args)
        _check_augmentation(args)


def _check_latency(args: argparse.Namespace) -> None:
    """Make sure that latency can be measured as the flags say: device and packages are there."""
    try:
        LatencyTable(device=args.latency_device, runtime=args.latency_runtime, threads=args.latency_threads)
    except LatencyError as error:
        flags = f"--latency {args.latency_runtime} --latency-device {args.latency_device}"
        raise ConfigError(f"{flags}: {error}. Each of these two flags has a default that works everywhere.") from error


def _check_name(flag: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        choices = f" of {', '.join(names)}" if len(names) < 20 else ""
        raise ConfigError(f"--{flag} {name} is unknown: needed one{choices}. Did you mean {near}?")


def _check_optimizer(args: argparse.Namespace) -> None:
    """Make the optimizer of a tiny model."""
    _check_name("opt", args.opt.lower().removeprefix("lookahead_"), list_optimizers())
    flags = argparse.Namespace(**{**vars(args), "lr": 0.1})
    try:
        create_optimizer_v2(nn.Sequential(nn.Linear(2, 2)), **optimizer_kwargs(flags) | args.opt_kwargs)
    except Exception as error:  # an optimizer may raise anything, also that a package is not installed
        raise ConfigError(
            f"--opt {args.opt} cannot be made with --opt-betas {args.opt_betas}, --opt-eps {args.opt_eps} and "
            f"--opt-kwargs {args.opt_kwargs}: {error}"
        ) from error


def _check_schedule(args: argparse.Namespace) -> None:
    if args.sched == "plateau":
        raise ConfigError("--sched plateau steps by a metric, and these recipes step by updates: give another one.")
    _check_name("sched", args.sched, SCHEDULERS)
    if args.sched != "none" and 0 < args.epochs < args.warmup_epochs:  # the learning rate would never reach --lr
        raise ConfigError(
            f"--warmup-epochs {args.warmup_epochs:g}: needed at most --epochs {args.epochs}, over which the learning "
            "rate rises to --lr and falls again."
        )
    try:
        scheduler = make_scheduler(args, SGD(nn.Linear(2, 2).parameters(), lr=0.1), 1)
    except Exception as error:  # whatever timm raises
        raise ConfigError(f"--sched {args.sched} cannot be made of these flags: {error}") from error
    if scheduler is None and args.sched != "none" and args.epochs:
        raise ConfigError(f"--sched {args.sched}: this version of timm does not have it; give cosine, or update timm.")


def _check_augmentation(args: argparse.Namespace) -> None:
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise ConfigError(f"--batch-size {args.batch_size}: --mixup and --cutmix pair images, and need an even number.")
    _check_name("remode", args.remode, ("const", "rand", "pixel"))
    try:
        create_transform(32, is_training=True, auto_augment=args.aa)
    except Exception as error:  # timm asserts, and parses numbers out of the text
        raise ConfigError(
            f"--aa {args.aa} is no policy of timm ({error}): needed such as rand-m9-mstd0.5, augmix-m5, original or v0."
        ) from error
