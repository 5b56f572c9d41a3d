"""The training loop that train.py and finetune.py share: timm's parts, exact resuming."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from accelerate import skip_first_batches
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from tqdm.auto import tqdm

from timm_autoslim.recipes.lib.checkpoints import Progress
from timm_autoslim.recipes.lib.divergence import Describe, NotFiniteError, check_losses, check_weights
from timm_autoslim.recipes.lib.run_folder import load_weights
from timm_autoslim.recipes.lib.summary import write_epoch
from timm_autoslim.recipes.lib.trackers import start_trackers
from timm_autoslim.recipes.lib.training import Training, make_mixup
from timm_autoslim.recipes.lib.validation import Validation

Backward = Callable[[Tensor], object]
TrainingStep = Callable[[nn.Module, Tensor, Tensor, int, Backward], Mapping[str, Tensor | None]]


@dataclass
class Epoch:
    """What the loop notes in one pass over the images; unlike `Progress`, no checkpoint needs it.

    Attributes:
        bar: shows how far the pass is.
        mixup: of this epoch.
        recent: steps with their losses, not yet checked: a check waits for the device.
        names: of the losses whose means are recorded.
        images: how many were trained on, in all processes.
        begin: when the pass began, in seconds of `time.perf_counter`.
    """

    bar: tqdm[NoReturn]
    mixup: Mixup | None
    recent: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    images: int = 0
    begin: float = field(default_factory=time.perf_counter)

    def images_per_s(self) -> float:
        """Return the speed so far."""
        return self.images / (time.perf_counter() - self.begin)


class Trainer:
    """A training that can be killed at any moment and goes on from its last checkpoint as if nothing had happened.

    Every random draw is a function of the seed and of what it is for: the images of a batch and their augmentation of
    (seed, epoch, image), mixup and dropout of (seed, batch, process), widths of (seed, update). So no generator's
    state has to be saved.
    """

    def __init__(
        self, training: Training, step: TrainingStep, validate: Validation | None = None,
        describe: Describe | None = None,
    ) -> None:  # fmt: skip
        """Take what the loop runs on and what it does in each step.

        Args:
            training: made by `prepare`.
            step: `step(network, inputs, targets, update, backward)`; runs its backward passes and returns losses by
                name: scalars, whose mean is recorded; None for what this step lacks; vectors, which are only checked.
                It is called --grad-accum-steps times an update.
            validate: metrics after an epoch; called on every process, on averaged weights if --model-ema is on.
            describe: `describe(name, index, update)` says what had that loss, for the error when it is not finite.
        """
        self.training, self.step, self.validate, self.describe = training, step, validate, describe
        self.accelerator, self.args = training.accelerator, training.args
        self.progress: Progress = copy.deepcopy(training.start.progress)

    def fit(self) -> dict[str, float]:
        """Train for --epochs, with a row of summary.csv and a checkpoint after each; return the last metrics.

        Raises:
            NotFiniteError: a loss or a weight is NaN or infinite; no such weights are saved.
        """
        training, args = self.training, self.args
        if not args.epochs:
            return {}
        if training.scheduler:
            training.scheduler.step_update(self.progress.total)
        start_trackers(self.accelerator, args, training.start.folder, self.progress.total)
        while self.progress.epoch < args.epochs:
            self._finish_epoch(self._train_epoch())
        if training.ema:
            training.model.load_state_dict(training.ema.module.state_dict())
        return self.progress.metrics

    def _train_epoch(self) -> Epoch:
        """Train on what is left of one pass over the images."""
        args, progress, loader = self.args, self.progress, self.training.loader
        accumulate, updates_per_epoch = args.grad_accum_steps, self.training.updates_per_epoch
        loader.set_epoch(progress.epoch)
        loader.dataset.epoch = progress.epoch
        self.training.network.train()
        first = progress.updates * accumulate
        bar: tqdm[NoReturn] = tqdm(
            total=updates_per_epoch, initial=progress.updates, desc=f"epoch {progress.epoch + 1}/{args.epochs}",
            disable=None if self.accelerator.is_main_process else True, leave=False,  # None: in a terminal alone
        )  # fmt: skip
        epoch = Epoch(bar, make_mixup(args, progress.epoch))
        with bar:
            for index, (inputs, targets) in enumerate(skip_first_batches(loader, first) if first else loader, first):
                if index >= updates_per_epoch * accumulate:
                    continue  # too few are left for an update
                self._train_batch(epoch, inputs, targets, index)
                if (index + 1) % accumulate == 0:
                    self._update()
                    bar.update()
                    self._check_and_log(epoch)
        return epoch

    def _train_batch(self, epoch: Epoch, inputs: Tensor, targets: Tensor, index: int) -> None:
        """Add the gradients of one batch; every --grad-accum-steps of them make an update."""
        args, accelerator, training = self.args, self.accelerator, self.training
        ordinal = self.progress.epoch * training.updates_per_epoch * args.grad_accum_steps + index
        seed = (args.seed * 1_000_003 + ordinal) * accelerator.num_processes + accelerator.process_index
        set_seed(seed % 2**32)  # of mixup, dropout and drop path
        if epoch.mixup:
            inputs, targets = epoch.mixup(inputs, targets)
        if args.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        last = (index + 1) % args.grad_accum_steps == 0
        with contextlib.nullcontext() if last else accelerator.no_sync(training.network):
            losses = self.step(training.network, inputs, targets, self.progress.total, self._backward)
        detached = {name: loss.detach().float() for name, loss in losses.items() if loss is not None}
        epoch.recent.append((self.progress.total, detached))
        epoch.names = [name for name, loss in losses.items() if loss is None or not loss.dim()]
        epoch.images += len(inputs) * accelerator.num_processes

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss / self.args.grad_accum_steps)

    def _update(self) -> None:
        """Take one optimizer step; all processes have the same gradients already."""
        args, progress, training = self.args, self.progress, self.training
        if args.clip_grad:
            self.accelerator.unscale_gradients()  # of fp16
            parameters = model_parameters(training.model, exclude_head="agc" in args.clip_mode)
            dispatch_clip_grad(parameters, args.clip_grad, args.clip_mode)
        training.stepper.step()
        training.stepper.zero_grad()
        progress.total += 1
        progress.updates += 1
        if training.scheduler:
            training.scheduler.step_update(progress.total)
        if training.ema:
            training.ema.update(training.model, step=progress.total)

    def _check_and_log(self, epoch: Epoch) -> None:
        """At intervals and at the end of the epoch, check and log the losses; at intervals, save a checkpoint."""
        args, progress = self.args, self.progress
        ends = progress.updates == self.training.updates_per_epoch
        save = args.recovery_interval and progress.updates % args.recovery_interval == 0 and not ends
        if not (ends or save or progress.updates % args.log_interval == 0):
            return
        self._record(epoch, reduce=bool(ends or save))
        means = progress.means()
        epoch.bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
        values = {f"train/{name}": value for name, value in means.items()}
        values |= {"train/images_per_s": epoch.images_per_s(), "lr": self._rate()}
        self.accelerator.log(values, step=progress.total)
        if save:
            self._prepare_checkpoint()
            self._save(progress)

    def _rate(self) -> float:
        return float(self.training.optimizer.param_groups[0]["lr"])

    def _record(self, epoch: Epoch, reduce: bool) -> None:
        """Add the recent losses to the epoch's sums, and stop if one is not finite."""
        progress = self.progress
        with self._tell_way_back():
            check_losses(epoch.recent, f"epoch {progress.epoch + 1} of {self.args.epochs}", self.describe)
        for _, losses in epoch.recent:
            for name in epoch.names:
                if name in losses:
                    progress.sums[name] = progress.sums.get(name, 0.0) + losses[name].item()
                    progress.counts[name] = progress.counts.get(name, 0) + 1
        epoch.recent.clear()
        if reduce and self.accelerator.num_processes > 1 and progress.sums:
            sums = torch.tensor(list(progress.sums.values()), dtype=torch.float64, device=self.accelerator.device)
            sums = self.accelerator.reduce(sums, "mean")
            progress.sums = dict(zip(progress.sums, sums.tolist(), strict=True))

    def _prepare_checkpoint(self) -> None:
        """Make sure that the weights are finite, and that all processes have the same BatchNorm statistics."""
        progress, training = self.progress, self.training
        with self._tell_way_back():
            check_weights(
                training.model, f"at step {progress.total} (epoch {progress.epoch + 1} of {self.args.epochs})"
            )
        if self.accelerator.num_processes > 1:
            for model in (training.model, training.ema.module) if training.ema else (training.model,):
                distribute_bn(model, self.accelerator.num_processes, reduce=True)

    def _save(self, progress: Progress) -> None:
        """Save a checkpoint, after `_prepare_checkpoint`."""
        training, start = self.training, self.training.start
        if self.accelerator.is_main_process:
            start.checkpoints.save(
                progress, start.identity, start.flags, training.model, training.optimizer, training.ema,
                self.accelerator.scaler,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _finish_epoch(self, epoch: Epoch) -> None:
        """Validate, write the row of summary.csv, and save a checkpoint."""
        args, progress, number = self.args, self.progress, self.progress.epoch
        speed = epoch.images_per_s()
        self._prepare_checkpoint()
        metrics: dict[str, float | None] = dict.fromkeys(self.validate.names if self.validate else ())
        if self.validate and ((number + 1) % args.val_interval == 0 or number + 1 == args.epochs):
            with use_average(self.training.model, self.training.ema):
                progress.metrics = self.validate()
            metrics |= progress.metrics
        measured = {name: value for name, value in metrics.items() if value is not None}
        self.accelerator.log({f"val/{name}": value for name, value in measured.items()}, step=progress.total)
        if self.accelerator.is_main_process:
            means = progress.means()
            losses = {name: means.get(name) for name in epoch.names}
            path = self.training.start.folder / "summary.csv"
            write_epoch(path, number, losses | {"images_per_s": speed}, metrics, self._rate())
            values = {name: value for name, value in losses.items() if value is not None}
            values |= {f"val {name}": value for name, value in measured.items() if name.endswith("top1")}
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            tqdm.write(f"epoch {number + 1}/{args.epochs}  {text}  trained at {speed:.0f} images/s")
        self.progress = Progress(epoch=number + 1, total=progress.total, metrics=progress.metrics)
        self._save(self.progress)

    @contextlib.contextmanager
    def _tell_way_back(self) -> Iterator[None]:
        """Add to an error that the training has diverged how to go on."""
        try:
            yield
        except NotFiniteError as error:
            advice = "lower --lr, or set --clip-grad or --warmup-epochs"
            paths = self.training.start.checkpoints.list_paths()
            way = f"The last good checkpoint is {paths[-1]}: {advice}, and --resume from it." if paths else (
                f"There is no checkpoint yet: {advice}, and start again."
            )  # fmt: skip
            raise NotFiniteError(f"{error} {way}") from None


@contextlib.contextmanager
def use_average(model: nn.Module, ema: ModelEmaV3 | None) -> Iterator[None]:
    """Put the moving average's weights in place for the length of a block."""
    if ema is None:
        yield
        return
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model.load_state_dict(ema.module.state_dict())
        yield
    finally:
        load_weights(model, weights)
