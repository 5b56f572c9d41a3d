"""What a training needs, as the flags say: loss, mixup, learning rate, optimizer, schedule, moving average."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.checkpoints import restore
from timm_autoslim.recipes.lib.resume import Start, count_images_per_update

LossFn = Callable[[Any, Tensor], Tensor]
AUXILIARY = 0.3  # weight of an auxiliary classifier's loss: Szegedy et al., "Going Deeper with Convolutions", 1409.4842


def make_loss(args: argparse.Namespace) -> LossFn:
    """Make the loss on labels: cross-entropy, smoothed, or of soft targets if mixup makes them.

    Of several logits, as torchvision's GoogLeNet returns them in training, all but the first are of auxiliary
    classifiers.
    """
    if args.mixup > 0 or args.cutmix > 0:
        loss: LossFn = SoftTargetCrossEntropy()
    else:
        loss = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()

    def compute(outputs: Any, targets: Tensor) -> Tensor:
        logits, *auxiliary = outputs if isinstance(outputs, tuple | list) else [outputs]
        total = loss(logits, targets)
        for other in auxiliary:
            total = total + AUXILIARY * loss(other, targets)
        return total

    return compute


def make_mixup(args: argparse.Namespace, epoch: int) -> Mixup | None:
    """Make timm's mixup and cutmix for one epoch, if they are on."""
    if args.mixup <= 0 and args.cutmix <= 0:
        return None
    mixup = Mixup(
        args.mixup, args.cutmix, prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing, num_classes=args.num_classes,
    )  # fmt: skip
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        mixup.mixup_enabled = False
    return mixup


def choose_learning_rate(args: argparse.Namespace, images: int) -> float:
    """Return --lr; or --lr-base at --lr-base-size images, scaled to the images of an update as timm's train.py does."""
    if args.lr is not None:
        return float(args.lr)
    adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
    share = images / args.lr_base_size
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    return float(args.lr_base * (share**0.5 if scale == "sqrt" else share))


def make_scheduler(args: argparse.Namespace, optimizer: Optimizer, updates_per_epoch: int) -> Scheduler | None:
    """Make timm's schedule, in steps of updates; None if there is no epoch, or no schedule is asked for."""
    if not args.epochs:
        return None
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr, min_lr=args.min_lr, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
        step_on_epochs=False, updates_per_epoch=updates_per_epoch,
    )  # fmt: skip
    return scheduler


@dataclass(frozen=True)
class Training:
    """Everything that a training loop runs on; made by `prepare`.

    Attributes:
        accelerator: Accelerate's.
        args: the flags.
        start: where the training begins.
        model: the module whose weights are trained and saved.
        network: what is called in a step, as Accelerate prepared it: the model, or the supernet around it.
        loader: the training images, as Accelerate prepared them.
        optimizer: timm's, whose groups the schedule sets.
        stepper: the same optimizer, as Accelerate prepared it.
        scheduler: timm's; None if there is no schedule.
        ema: the moving average of the model's weights, in eval mode; None if there is none.
        updates_per_epoch: optimizer steps in one epoch.
    """

    accelerator: Accelerator
    args: argparse.Namespace
    start: Start
    model: nn.Module
    network: nn.Module
    loader: Any
    optimizer: Optimizer
    stepper: Any
    scheduler: Scheduler | None
    ema: ModelEmaV3 | None
    updates_per_epoch: int

    @property
    def updates(self) -> int:
        """Optimizer steps of the complete training."""
        return int(self.args.epochs * self.updates_per_epoch)


def prepare(
    accelerator: Accelerator, args: argparse.Namespace, start: Start, network: nn.Module, model: nn.Module,
    loader: DataLoader[Any],
) -> Training:  # fmt: skip
    """Make optimizer, schedule and moving average, and load what the last checkpoint has of them.

    Args:
        accelerator: Accelerate's.
        args: the flags.
        start: where the training begins.
        network: what is called in a step, on the device: a supernet, or the model itself.
        model: the module whose weights are trained and saved: `supernet.model`, or the model itself.
        loader: the training images, not yet prepared by Accelerate.

    Raises:
        DataError: the images do not fill one update.
    """
    images = count_images_per_update(accelerator, args)
    flags = argparse.Namespace(**{**vars(args), "lr": choose_learning_rate(args, images)})
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(flags) | args.opt_kwargs)
    prepared_network, stepper, prepared_loader = accelerator.prepare(network, optimizer, loader)
    updates_per_epoch = len(prepared_loader) // args.grad_accum_steps
    if args.epochs and not updates_per_epoch:
        dataset: Any = loader.dataset
        raise DataError(
            f"{len(dataset)} training images do not fill one update of {images}: lower --batch-size or "
            "--grad-accum-steps."
        )
    scheduler = make_scheduler(args, optimizer, updates_per_epoch)
    ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None
    if start.checkpoint:
        restore(start.checkpoint.path, model, optimizer, ema, accelerator.scaler)
    return Training(
        accelerator, args, start, model, prepared_network, prepared_loader, optimizer, stepper, scheduler, ema,
        updates_per_epoch,
    )  # fmt: skip
