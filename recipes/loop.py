"""The epoch loop that train.py and finetune.py share: Accelerate, timm's parts, exact resuming."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from common import read_weights, write_json, write_weights
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn, update_summary
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_autoslim.errors import AutoSlimError, ConfigError

REFUSED = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}

Step = Callable[[nn.Module, Tensor, Tensor, int], dict[str, Tensor | None]]


class NotFiniteError(AutoSlimError, FloatingPointError):
    """A loss or a weight has turned infinite or NaN: the training has diverged."""


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set up processes, device and precision.

    Raises:
        ConfigError: Accelerate is configured for DeepSpeed, FSDP or Megatron-LM.
    """
    for name, variable in REFUSED.items():
        # DeepSpeed steps its engine in every backward, and the others flatten parameters that a subnet must slice.
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"{name} cannot train a supernet: a step has several backward passes over slices of the parameters. "
                "Launch with --multi_gpu (plain data parallelism) instead."
            )
    if args.threads:
        torch.set_num_threads(args.threads)
    return Accelerator(
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}[args.amp_dtype] if args.amp else None,
        kwargs_handlers=[
            # Slicing gives every parameter a gradient, and each subnet is one forward: nothing to look for.
            DistributedDataParallelKwargs(find_unused_parameters=False, static_graph=False, broadcast_buffers=False)
        ],
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )


def make_loss(args: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    """The hard-label loss: cross-entropy, smoothed, or soft if mixup makes the targets so."""
    if args.mixup > 0 or args.cutmix > 0:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> dict[str, float]:
    """Cross-entropy and top-1 accuracy in percent over a prepared loader, from all processes together."""
    model.eval()
    loss, correct, total = 0.0, 0, 0
    for inputs, targets in loader:
        with accelerator.autocast():
            outputs = model(inputs).float()  # (N, classes)
        losses = F.cross_entropy(outputs, targets, reduction="none")  # (N,)
        losses, hits = accelerator.gather_for_metrics((losses, outputs.argmax(dim=1) == targets))
        loss, correct, total = loss + losses.double().sum().item(), correct + int(hits.sum()), total + len(hits)
    return {"loss": loss / total, "top1": 100 * correct / total}


def fit(
    accelerator: Accelerator,
    args: argparse.Namespace,
    network: nn.Module,
    plain: nn.Module,
    loader: DataLoader,
    step: Step,
    validate: Callable[[], dict[str, float]],
    folder: Path,
    *,
    begin: Callable[[int, nn.Module | None], None] | None = None,
    describe: Callable[[str, int, int], str] | None = None,
) -> dict[str, float]:
    """Train for args.epochs, with a row of summary.csv and a checkpoint after each, and return the last metrics.

    Args:
        accelerator: as made by `make_accelerator`.
        args: the training flags.
        network: what is trained, on the device (a supernet or a plain model).
        plain: the module whose weights are kept: `supernet.model`, or `network` itself.
        loader: the training loader, not prepared.
        step: `step(prepared network, inputs, targets, update)`; runs its backward passes and returns losses by name:
            scalars, whose mean is recorded; None for what this step lacks; vectors, which are only checked.
        validate: metrics after an epoch; called on every process, on averaged weights if --model-ema is on.
        folder: holds summary.csv and checkpoints/.
        begin: `begin(updates, ema)`, called once before the first step: how many updates the whole training has, and
            the moving average (in eval mode) or None.
        describe: `describe(name, index, update)`, what had that loss; for the error when it is not finite.

    Raises:
        NotFiniteError: a loss or a weight is NaN or infinite; no such weights are kept as a checkpoint.
    """
    if not args.epochs:
        return {}
    rate = args.lr or args.lr_base * args.batch_size * accelerator.num_processes / 256
    optimizer = create_optimizer_v2(
        plain, opt=args.opt, lr=rate, weight_decay=args.weight_decay, momentum=args.momentum
    )  # of the bare optimizer, so that the scheduler sees its groups
    prepared, stepper, loader = accelerator.prepare(network, optimizer, loader)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=args.warmup_lr,
        min_lr=args.min_lr, decay_epochs=args.decay_epochs, decay_rate=args.decay_rate,
        step_on_epochs=False, updates_per_epoch=len(loader),
    )  # fmt: skip
    ema = ModelEmaV3(plain, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None
    checkpoints = Checkpoints(folder, plain, optimizer, ema, accelerator.scaler)
    start, metrics = checkpoints.load() if args.resume else (0, {})
    if begin:
        begin(args.epochs * len(loader), ema.module if ema else None)
    if scheduler:
        scheduler.step_update(start * len(loader))
    for epoch in range(start, args.epochs):
        set_seed(args.seed + 1000 * epoch, device_specific=True)  # so that resuming goes on exactly
        loader.set_epoch(epoch)
        prepared.train()
        try:
            losses = _epoch(accelerator, args, prepared, plain, stepper, scheduler, ema, loader, step, describe, epoch)
            _check_weights(plain, f"after epoch {epoch + 1} of {args.epochs}")
        except NotFiniteError as error:
            raise NotFiniteError(f"{error} {checkpoints.way_back()}") from None
        if accelerator.num_processes > 1:
            for model in (plain, ema.module) if ema else (plain,):
                distribute_bn(model, accelerator.num_processes, reduce=True)
        with averaged(plain, ema):
            metrics = validate()
        if accelerator.is_main_process:
            summary = folder / "summary.csv"
            _trim(summary, epoch)
            update_summary(epoch, losses, metrics, summary, lr=optimizer.param_groups[0]["lr"], write_header=epoch == 0)
            checkpoints.save(epoch, metrics)
            figures = "  ".join(
                f"{name} {value:.4g}" for name, value in (losses | metrics).items() if value is not None
            )
            tqdm.write(f"epoch {epoch + 1}/{args.epochs}  {figures}")
        accelerator.wait_for_everyone()
    if ema:
        plain.load_state_dict(ema.module.state_dict())
    return metrics


def _epoch(
    accelerator: Accelerator, args: argparse.Namespace, prepared: nn.Module, plain: nn.Module, stepper: Any,
    scheduler: Any, ema: ModelEmaV3 | None, loader: DataLoader, step: Step,
    describe: Callable[[str, int, int], str] | None, epoch: int,
) -> dict[str, float | None]:  # fmt: skip
    """One pass over the training images; returns the mean of each loss, over the steps that had it."""
    mixup = None
    if args.mixup > 0 or args.cutmix > 0:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=args.num_classes)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    recent: list[tuple[int, dict[str, Tensor]]] = []  # not looked at yet: a look waits for the device
    bar = tqdm(loader, desc=f"epoch {epoch + 1}/{args.epochs}", disable=not accelerator.is_main_process, leave=False)
    for index, (inputs, targets) in enumerate(bar):
        update = epoch * len(loader) + index
        if mixup:
            inputs, targets = mixup(inputs, targets)
        if args.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        losses = step(prepared, inputs, targets, update)
        if args.clip_grad:
            accelerator.clip_grad_norm_(prepared.parameters(), args.clip_grad)
        stepper.step()
        stepper.zero_grad()
        if scheduler:
            scheduler.step_update(update + 1)
        if ema:
            ema.update(plain, step=update + 1)
        had = {name: loss.detach().float() for name, loss in losses.items() if loss is not None}
        recent.append((update, had))
        recorded = [name for name, loss in losses.items() if loss is None or not loss.dim()]
        for name in had.keys() & recorded:
            sums[name], counts[name] = sums.get(name, 0) + had[name], counts.get(name, 0) + 1
        if index % args.log_interval == 0 or index + 1 == len(loader):
            _check_losses(recent, f"epoch {epoch + 1} of {args.epochs}", describe)
            recent.clear()
            means = {name: sums[name].item() / counts[name] if name in sums else None for name in recorded}
            bar.set_postfix({name: f"{value:.3f}" for name, value in means.items() if value is not None})
    return means


def _check_losses(
    recent: list[tuple[int, dict[str, Tensor]]], epoch: str, describe: Callable[[str, int, int], str] | None
) -> None:
    if torch.cat([loss.flatten() for _, losses in recent for loss in losses.values()]).isfinite().all():
        return
    for update, losses in recent:
        for name, loss in losses.items():
            for index, value in enumerate(loss.flatten().tolist()):
                if not math.isfinite(value):
                    what = f" of {describe(name, index, update)}" if describe else ""
                    raise NotFiniteError(f"The loss is not finite at step {update} ({epoch}): {name} is {value}{what}.")


def _check_weights(model: nn.Module, when: str) -> None:
    # The last step of an epoch may have ruined the weights after its loss was seen, and a checkpoint would keep them.
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


class Checkpoints:
    """checkpoints/epoch-NNNN of a run: written whole (a folder that is renamed), only the newest one kept."""

    def __init__(self, folder: Path, plain: nn.Module, optimizer: Any, ema: ModelEmaV3 | None, scaler: Any):
        self.folder = folder / "checkpoints"
        self.weights = {"model.safetensors": plain} | ({"ema.safetensors": ema.module} if ema else {})
        self.states = {"optimizer": optimizer} | ({"scaler": scaler} if scaler else {})

    def save(self, epoch: int, metrics: dict[str, float]) -> None:
        """Keep everything that the next epoch needs."""
        older = list(self.folder.glob("epoch-*")) if self.folder.is_dir() else []
        target = self.folder / f"epoch-{epoch:04d}"
        part = self.folder / "part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, model in self.weights.items():
            write_weights(part / name, model)
        torch.save({name: state.state_dict() for name, state in self.states.items()}, part / "optimizer.pt")
        write_json(part / "progress.json", {"epoch": epoch, "metrics": metrics})
        os.replace(part, target)
        for path in older:
            shutil.rmtree(path)

    def newest(self) -> Path | None:
        """The last whole checkpoint's folder."""
        return max(self.folder.glob("epoch-*"), default=None) if self.folder.is_dir() else None

    def way_back(self) -> str:
        """Say how to go on after the training has diverged."""
        newest = self.newest()
        mend = "lower --lr, or set --clip-grad or --warmup-epochs"
        if newest is None:
            return f"There is no checkpoint yet: {mend}, and start again."
        return f"The last good checkpoint is {newest}: {mend}, and --resume from it."

    def load(self) -> tuple[int, dict[str, float]]:
        """Load the newest; returns the epoch to go on with (0 if there is none) and the metrics so far."""
        newest = self.newest()
        if newest is None:
            return 0, {}
        for name, model in self.weights.items():
            read_weights(newest / name, model)
        states = torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
        groups = self.states["optimizer"].param_groups
        flags = [{key: group[key] for key in ("lr", "weight_decay")} for group in groups]
        for name, state in self.states.items():
            state.load_state_dict(states[name])
        for group, given in zip(self.states["optimizer"].param_groups, flags, strict=True):
            group.update(given)  # so that a run may go on with a lower --lr, with or without a schedule
        progress = json.loads((newest / "progress.json").read_text(encoding="utf-8"))
        return progress["epoch"] + 1, progress["metrics"]


def _trim(summary: Path, epoch: int) -> None:
    """Drop rows that an interrupted run wrote after its last checkpoint."""
    if summary.is_file():
        with summary.open(encoding="utf-8") as lines:
            kept = list(itertools.islice(lines, epoch + 1 if epoch else 0))
        summary.write_text("".join(kept), encoding="utf-8")
