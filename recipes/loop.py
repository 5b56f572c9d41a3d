"""The training loop that train.py and finetune.py share: timm's parts, exact resuming."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from checkpoints import Checkpoints, Progress, check_same, restore
from common import check_numbers
from processes import start_trackers
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, update_summary
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from validation import Validation

from timm_autoslim.errors import AutoSlimError, ConfigError, DataError
from timm_autoslim.utils.files import write_text

# A resumed run may differ in these without a word: they do not change the weights.
SILENT = ("config", "data_dir", "output", "experiment", "run", "resume", "workers", "log_interval", "checkpoint_hist",
          "log_wandb", "log_tensorboard", "wandb_project", "val_interval")  # fmt: skip

Backward = Callable[[Tensor], object]
Step = Callable[[nn.Module, Tensor, Tensor, int, Backward], Mapping[str, Tensor | None]]


class NotFiniteError(AutoSlimError, FloatingPointError):
    """A loss or a weight has turned infinite or NaN: the training has diverged."""


def make_loss(args: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    """The hard-label loss: cross-entropy, smoothed, or soft if mixup makes the targets so."""
    if args.mixup > 0 or args.cutmix > 0:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def make_mixup(args: argparse.Namespace) -> Mixup | None:
    """Timm's mixup and cutmix, if they are on."""
    if args.mixup <= 0 and args.cutmix <= 0:
        return None
    return Mixup(
        args.mixup, args.cutmix, prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing, num_classes=args.num_classes,
    )  # fmt: skip


def learning_rate(args: argparse.Namespace, images: int) -> float:
    """--lr; or --lr-base at --lr-base-size images, scaled to the images of an update as timm's train.py does."""
    if args.lr is not None:
        return float(args.lr)
    adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
    share = images / args.lr_base_size
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    return float(args.lr_base * (share**0.5 if scale == "sqrt" else share))


# ---------------------------------------------------------------------------------------------------- the training


def check_training(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be, before any work is done; raises as `check_numbers` does."""
    check_numbers(args, {
        0: ("epochs", "recovery_interval", "warmup_epochs"),
        1: ("grad_accum_steps", "checkpoint_hist", "log_interval", "val_interval", "lr_base_size"),
    })  # fmt: skip


class Trainer:
    """A training that can be killed at any moment and goes on from its last checkpoint as if nothing had happened.

    Every random draw is a function of the seed and of what it is for: the images of a batch and their augmentation of
    (seed, epoch, image), mixup and dropout of (seed, batch, process), widths of (seed, update). So no generator's
    state has to be kept.
    """

    def __init__(
        self, accelerator: Accelerator, args: argparse.Namespace, folder: Path, fixed: Mapping[str, object]
    ) -> None:
        """Find out where to begin. `fixed` is what a resumed run must have in common with the one before.

        Raises:
            ConfigError: the run cannot go on with these flags.
            CheckpointError: all of its checkpoints are damaged.
        """
        self.accelerator, self.args, self.folder = accelerator, args, folder
        self.images = args.batch_size * accelerator.num_processes * args.grad_accum_steps  # of one update
        everything = {**fixed, "images_per_update": self.images, "opt": args.opt, "seed": args.seed,
                      "model_ema": args.model_ema}  # fmt: skip
        self.fixed: dict[str, Any] = json.loads(json.dumps(everything))
        self.flags = json.loads(json.dumps({**vars(args), "processes": accelerator.num_processes}))
        self.checkpoints = Checkpoints(folder, args.checkpoint_hist)
        self.path: Path | None = None
        self.progress = Progress()
        if args.resume:
            self._find()

    def _find(self) -> None:
        with self.accelerator.main_process_first():  # which puts damaged checkpoints aside
            found = self.checkpoints.newest()
        if found:
            self.path, self.progress = found
        totals = self.accelerator.gather(torch.tensor([self.progress.total], device=self.accelerator.device))
        if len(set(totals.tolist())) > 1:
            raise ConfigError(
                f"The processes find checkpoints of different ages in {self.checkpoints.folder} (updates "
                f"{totals.tolist()}): --output must lie on a disk that all machines share."
            )
        if not found:
            return
        check_same(self.progress.fixed, self.fixed)
        before = self.progress.flags
        changed = [name for name, value in self.flags.items() if name not in SILENT and before.get(name) != value]
        self.accelerator.print(f"Going on from {self.path.name if self.path else ''} (epoch {self.progress.epoch + 1})")
        if changed:
            told = ", ".join(f"{name} {self.flags[name]} (was {before.get(name)})" for name in changed)
            self.accelerator.print(f"Changed since: {told}. The result is not that of the uninterrupted run.")

    def fit(
        self, network: nn.Module, plain: nn.Module, loader: DataLoader, step: Step,
        validate: Validation | None = None, *,
        begin: Callable[[int, nn.Module | None], None] | None = None,
        describe: Callable[[str, int, int], str] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Train for args.epochs, with a row of summary.csv and a checkpoint after each, and return the last metrics.

        Args:
            network: what is trained, on the device (a supernet or a plain model).
            plain: the module whose weights are kept: `supernet.model`, or `network` itself.
            loader: the training loader, not prepared.
            step: `step(prepared network, inputs, targets, update, backward)`; runs its backward passes and returns
                losses by name: scalars, whose mean is recorded; None for what this step lacks; vectors, which are only
                checked. It is called --grad-accum-steps times an update.
            validate: metrics after an epoch; called on every process, on averaged weights if --model-ema is on.
            begin: `begin(updates, ema)`, called once before the first step: how many updates the whole training has,
                and the moving average (in eval mode) or None.
            describe: `describe(name, index, update)`, what had that loss; for the error when it is not finite.

        Raises:
            NotFiniteError: a loss or a weight is NaN or infinite; no such weights are kept as a checkpoint.
        """
        if not self.args.epochs:
            return {}
        self.plain, self.step, self.describe = plain, step, describe
        self._prepare(network, loader)
        if begin:
            begin(self.args.epochs * self.per_epoch, self.ema.module if self.ema else None)
        if self.scheduler:
            self.scheduler.step_update(self.progress.total)
        start_trackers(self.accelerator, self.args, self.folder, self.progress.total)
        while self.progress.epoch < self.args.epochs:
            losses = self._epoch()
            self._finish_epoch(losses, validate)
        if self.ema:
            plain.load_state_dict(self.ema.module.state_dict())
        return self.progress.metrics

    def _prepare(self, network: nn.Module, loader: DataLoader) -> None:
        """Set up optimizer, schedule and moving average, as the flags or the last checkpoint have them."""
        args, accelerator = self.args, self.accelerator
        rate = learning_rate(args, self.images)
        options = optimizer_kwargs(argparse.Namespace(**{**vars(args), "lr": rate})) | args.opt_kwargs
        self.optimizer = create_optimizer_v2(self.plain, **options)  # the bare one, whose groups the scheduler sees
        self.network, self.stepper, self.loader = accelerator.prepare(network, self.optimizer, loader)
        self.per_epoch = len(self.loader) // args.grad_accum_steps
        if not self.per_epoch:
            raise DataError(
                f"{len(loader.dataset)} training images do not fill one update of {self.images}: lower --batch-size "
                "or --grad-accum-steps."
            )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=args.sched, num_epochs=args.epochs, warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr, min_lr=args.min_lr, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
            step_on_epochs=False, updates_per_epoch=self.per_epoch,
        )  # fmt: skip
        self.ema = ModelEmaV3(self.plain, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None
        if self.path:
            restore(self.path, self.plain, self.optimizer, self.ema, accelerator.scaler)

    def _epoch(self) -> dict[str, float | None]:
        """What is left of one pass over the images; returns the mean of each loss, over the steps that had it."""
        args, progress, accum = self.args, self.progress, self.args.grad_accum_steps
        mixup = make_mixup(args)
        if mixup and args.mixup_off_epoch and progress.epoch >= args.mixup_off_epoch:
            mixup.mixup_enabled = False
        self.recent: list[tuple[int, dict[str, Tensor]]] = []  # not looked at: a look waits for the device
        self.recorded: list[str] = []
        self.loader.set_epoch(progress.epoch)
        self.loader.dataset.epoch = progress.epoch
        self.network.train()
        done = progress.updates * accum
        loader = skip_first_batches(self.loader, done) if done else self.loader
        bar = tqdm(
            total=self.per_epoch, initial=progress.updates, desc=f"epoch {progress.epoch + 1}/{args.epochs}",
            disable=not self.accelerator.is_main_process, leave=False,
        )  # fmt: skip
        self.begun, self.trained = time.perf_counter(), 0
        with bar:
            for index, (inputs, targets) in enumerate(loader, done):
                if index >= self.per_epoch * accum:
                    continue  # too few are left for an update
                self._batch(inputs, targets, mixup, index, bar)
        return {name: progress.sums[name] / progress.counts[name] if name in progress.counts else None
                for name in self.recorded}  # fmt: skip

    def _batch(self, inputs: Tensor, targets: Tensor, mixup: Mixup | None, index: int, bar: tqdm) -> None:
        """One batch; every --grad-accum-steps of them make an update."""
        args, accelerator, progress, accum = self.args, self.accelerator, self.progress, self.args.grad_accum_steps
        ordinal = progress.epoch * self.per_epoch * accum + index
        seed = (args.seed * 1_000_003 + ordinal) * accelerator.num_processes + accelerator.process_index
        set_seed(seed % 2**32)  # of mixup, dropout and drop path
        if mixup:
            inputs, targets = mixup(inputs, targets)
        if args.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        last = (index + 1) % accum == 0
        with contextlib.nullcontext() if last else accelerator.no_sync(self.network):
            losses = self.step(self.network, inputs, targets, progress.total, self._backward)
        had = {name: loss.detach().float() for name, loss in losses.items() if loss is not None}
        self.recent.append((progress.total, had))
        self.recorded = [name for name, loss in losses.items() if loss is None or not loss.dim()]
        self.trained += len(inputs) * accelerator.num_processes
        if last:
            self._update()
            bar.update()
            self._look(bar)

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss / self.args.grad_accum_steps)

    def _update(self) -> None:
        """One optimizer step, of gradients that are exchanged already."""
        args, progress = self.args, self.progress
        if args.clip_grad:
            self.accelerator.unscale_gradients()  # of fp16
            parameters = model_parameters(self.plain, exclude_head="agc" in args.clip_mode)
            dispatch_clip_grad(parameters, args.clip_grad, args.clip_mode)
        self.stepper.step()
        self.stepper.zero_grad()
        progress.total += 1
        progress.updates += 1
        if self.scheduler:
            self.scheduler.step_update(progress.total)
        if self.ema:
            self.ema.update(self.plain, step=progress.total)

    def _look(self, bar: tqdm) -> None:
        """At intervals and at the end, look at the losses; at intervals, keep a checkpoint."""
        args, progress = self.args, self.progress
        ends = progress.updates == self.per_epoch
        keep = args.recovery_interval and progress.updates % args.recovery_interval == 0 and not ends
        if not (ends or keep or progress.updates % args.log_interval == 0):
            return
        self._record(reduce=bool(ends or keep))
        means = {name: progress.sums[name] / progress.counts[name] for name in progress.counts}
        bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
        speed = self.trained / (time.perf_counter() - self.begun)
        figures = {f"train/{name}": value for name, value in means.items()}
        rate = self.optimizer.param_groups[0]["lr"]
        self.accelerator.log({**figures, "train/images_per_s": speed, "lr": rate}, step=progress.total)
        if keep:
            self._save()

    def _record(self, reduce: bool) -> None:
        """Add the recent losses to the epoch's sums, and stop if one is not finite."""
        progress = self.progress
        try:
            check_losses(self.recent, f"epoch {progress.epoch + 1} of {self.args.epochs}", self.describe)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error} {self._way_back()}") from None
        for _, losses in self.recent:
            for name in self.recorded:
                if name in losses:
                    progress.sums[name] = progress.sums.get(name, 0.0) + losses[name].item()
                    progress.counts[name] = progress.counts.get(name, 0) + 1
        self.recent.clear()
        if reduce and self.accelerator.num_processes > 1 and progress.sums:
            sums = torch.tensor(list(progress.sums.values()), dtype=torch.float64, device=self.accelerator.device)
            sums = self.accelerator.reduce(sums, "mean")
            progress.sums = dict(zip(progress.sums, sums.tolist(), strict=True))

    def _settle(self) -> None:
        """Make sure that weights may be kept, and that all processes have the same BatchNorm statistics."""
        progress = self.progress
        try:
            check_weights(self.plain, f"at step {progress.total} (epoch {progress.epoch + 1} of {self.args.epochs})")
        except NotFiniteError as error:
            raise NotFiniteError(f"{error} {self._way_back()}") from None
        if self.accelerator.num_processes > 1:
            for model in (self.plain, self.ema.module) if self.ema else (self.plain,):
                distribute_bn(model, self.accelerator.num_processes, reduce=True)

    def _save(self, settled: bool = False) -> None:
        if not settled:
            self._settle()
        if self.accelerator.is_main_process:
            progress = dataclasses.replace(self.progress, fixed=self.fixed, flags=self.flags)
            self.checkpoints.save(progress, self.plain, self.optimizer, self.ema, self.accelerator.scaler)
        self.accelerator.wait_for_everyone()

    def _finish_epoch(self, losses: dict[str, float | None], validate: Validation | None) -> None:
        args, progress, epoch = self.args, self.progress, self.progress.epoch
        speed = self.trained / (time.perf_counter() - self.begun)
        self._settle()
        metrics: dict[str, float | None] = dict.fromkeys(validate.names if validate else ())
        if validate and ((epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs):
            with averaged(self.plain, self.ema):
                progress.metrics = validate()
            metrics |= progress.metrics
        rate = self.optimizer.param_groups[0]["lr"]
        known = {name: value for name, value in metrics.items() if value is not None}
        self.accelerator.log({f"val/{name}": value for name, value in known.items()}, step=progress.total)
        if self.accelerator.is_main_process:
            summary = self.folder / "summary.csv"
            trim(summary, epoch)
            update_summary(epoch, losses | {"images_per_s": speed}, metrics, summary, lr=rate, write_header=epoch == 0)
            shown = {name: value for name, value in losses.items() if value is not None}
            shown |= {f"val {name}": value for name, value in known.items() if name.endswith("top1")}
            figures = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            tqdm.write(f"epoch {epoch + 1}/{args.epochs}  {figures}  trained at {speed:.0f} images/s")
        self.progress = Progress(epoch=epoch + 1, total=progress.total, metrics=progress.metrics)
        self._save(settled=True)

    def _way_back(self) -> str:
        """Say how to go on after the training has diverged."""
        names = self.checkpoints.names()
        mend = "lower --lr, or set --clip-grad or --warmup-epochs"
        if not names:
            return f"There is no checkpoint yet: {mend}, and start again."
        return f"The last good checkpoint is {names[-1]}: {mend}, and --resume from it."


# ------------------------------------------------------------------------------------------------------- its parts


def check_losses(
    recent: list[tuple[int, dict[str, Tensor]]], epoch: str, describe: Callable[[str, int, int], str] | None
) -> None:
    """Stop at the first loss that is not finite.

    Raises:
        NotFiniteError: with its step, its value and what had it.
    """
    every = [loss.flatten() for _, losses in recent for loss in losses.values()]
    if not every or torch.cat(every).isfinite().all():
        return
    for update, losses in recent:
        for name, loss in losses.items():
            for index, value in enumerate(loss.flatten().tolist()):
                if not math.isfinite(value):
                    what = f" of {describe(name, index, update)}" if describe else ""
                    raise NotFiniteError(f"The loss is not finite at step {update} ({epoch}): {name} is {value}{what}.")


def check_weights(model: nn.Module, when: str) -> None:
    """Stop if a weight is not finite: the last step may have ruined it after its loss was seen.

    Raises:
        NotFiniteError: with the first such weight.
    """
    running = (
        (name, buffer) for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    )
    for name, value in itertools.chain(model.named_parameters(), running):
        if not value.isfinite().all():
            raise NotFiniteError(f"The weights are not finite {when}, though the losses were: see {name}.")


@contextlib.contextmanager
def averaged(plain: nn.Module, ema: ModelEmaV3 | None) -> Iterator[None]:
    """Put the moving average's weights in place for the length of a block."""
    if ema is None:
        yield
        return
    own = {name: value.clone() for name, value in plain.state_dict().items()}
    try:
        plain.load_state_dict(ema.module.state_dict())
        yield
    finally:
        plain.load_state_dict(own)


def trim(summary: Path, epoch: int) -> None:
    """Drop rows that an interrupted run wrote after its last checkpoint, and what it wrote of a row half."""
    if summary.is_file():
        with summary.open(encoding="utf-8") as lines:
            kept = list(itertools.islice(lines, epoch + 1 if epoch else 0))
        write_text(summary, "".join(kept))
