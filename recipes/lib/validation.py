"""What a network is worth: the accuracies of a model, and of several subnets of a supernet during its training."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from timm_autoslim import SearchSpace, Supernet, Widths, batch_statistics, calibrate
from timm_autoslim.errors import ConfigError


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any], name: str = "") -> dict[str, float]:
    """Return cross-entropy, top-1 and top-5 accuracy in percent over a prepared loader, from all processes together."""
    model.eval()
    loss, total = 0.0, 0
    hits = torch.zeros(2, dtype=torch.long)  # top-1, top-5
    quiet = None if name and accelerator.is_main_process else True  # None: shown in a terminal or a notebook alone
    for inputs, targets in tqdm(loader, desc=f"validate {name}", disable=quiet, leave=False):
        with accelerator.autocast():
            outputs = model(inputs).float()  # (N, classes)
        losses = F.cross_entropy(outputs, targets, reduction="none")  # (N,)
        ranked = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]  # (N, 5)
        losses, ranked = accelerator.gather_for_metrics((losses, ranked))
        loss, total = loss + losses.double().sum().item(), total + len(losses)
        hits += torch.stack([ranked[:, 0].sum(), ranked.sum()]).cpu()
    return {"loss": loss / total, "top1": 100 * hits[0].item() / total, "top5": 100 * hits[1].item() / total}


def describe_chance(top1: float, classes: int) -> str:
    """Say that an accuracy, in per cent, is hardly better than chance; empty if it is."""
    chance = 100 / classes
    if top1 >= chance + (100 - chance) / 10:
        return ""
    return (
        f"Warning: that is hardly better than chance ({chance:.1f} %). Are these the weights "
        "of these classes, in this order, for images of this --mean, --std and --img-size?"
    )


class Validation:
    """Accuracies of the widest, some uniform and the narrowest subnet, each with its own BatchNorm statistics.

    All are extracted from the supernet and calibrated, each process on its share of the calibration images.
    """

    def __init__(
        self, accelerator: Accelerator, args: argparse.Namespace, supernet: Supernet, calibration: Sequence[Tensor],
        loader: DataLoader[Any],
    ) -> None:  # fmt: skip
        dataset: Any = loader.dataset
        self.accelerator, self.supernet, self.calibration = accelerator, supernet, calibration
        self.loader = accelerator.prepare(loader)
        self.images = len(dataset)
        self.subnets = choose_subnets(supernet.space, args.val_widths)

    @property
    def names(self) -> list[str]:
        """The names of all metrics, in order."""
        return [f"{name}_{key}" for name in self.subnets for key in ("loss", "top1", "top5")] + ["images_per_s"]

    def __call__(self) -> dict[str, float]:
        """Measure; to be called by every process."""
        begin = time.perf_counter()
        metrics: dict[str, float] = {}
        for name, widths in self.subnets.items():
            model = self.supernet.extract(widths)  # the widest too: averages of its training lag behind its weights
            calibrate(model, self.calibration, distributed=True)
            accuracies = evaluate(self.accelerator, model, self.loader, name)
            metrics |= {f"{name}_{key}": value for key, value in accuracies.items()}
        speed = self.images * len(self.subnets) / (time.perf_counter() - begin)
        return metrics | {"images_per_s": speed}


def choose_subnets(space: SearchSpace, shares: Sequence[float]) -> dict[str, Widths]:
    """Return the widest, the uniform subnets of some shares from wide to narrow, and the narrowest, by name."""
    uniform = {f"uniform_{share:g}": space.uniform(share) for share in sorted(set(shares), reverse=True)}
    return {"widest": space.max(), **uniform, "narrowest": space.min()}


def check_batch(model: nn.Module, forward: Callable[[Tensor], object], images: Tensor, processes: int = 1) -> None:
    """Make sure that every BatchNorm gets more than one value per channel in training: one value has no variance.

    Args:
        model: the model with the BatchNorms; its statistics stay as they are.
        forward: runs the model, or a subnet of it, on `images`.
        images: (N, C, H, W), as many as a step has in one process.
        processes: over how many processes SyncBatchNorm joins its batches.

    Raises:
        ConfigError: a BatchNorm would get a single value.
    """

    def look(path: str, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].numel() // inputs[0].shape[1]
        if values * (processes if isinstance(norm, nn.SyncBatchNorm) else 1) < 2:
            raise ConfigError(
                f"--batch-size {len(images)} is too small: {path} is a BatchNorm over one value per channel "
                f"(its input is {tuple(inputs[0].shape)}), which has no variance. Give --batch-size 2 or more"
                + (", or --sync-bn." if processes > 1 else ".")
            )

    norms = {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    # by path, because a subnet runs on copies of the modules
    hooks = [norm.register_forward_pre_hook(functools.partial(look, path)) for path, norm in norms.items()]
    try:
        with batch_statistics(model), torch.no_grad():
            forward(images)
    finally:
        for hook in hooks:
            hook.remove()
