"""BatchNorm statistics: measure those of a plain model, or normalise by the batch while a subnet is scored."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_autoslim.errors import DataError, StaleStatisticsError


def calibrate(plain: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the running statistics of every BatchNorm anew, as the average over `batches`.

    A subnet's statistics are not those of the network that it was cut from, and with foreign ones its accuracy is near
    chance. The average is cumulative, each batch counting the same (Yu and Huang, "Universally Slimmable Networks",
    arXiv 1903.05134, "Post-Statistics of Batch Normalization"). Only the BatchNorms run in training mode: dropout and
    drop-path stay off. If anything fails on the way, the model is left with the statistics that it had.

    Args:
        plain: the model, changed in place; one without running statistics is left alone.
        batches: inputs (N, C, H, W) on the model's device, all of the same size; a few thousand images are plenty.

    Raises:
        DataError: `batches` is empty, or its first item is not a tensor.
    """
    norms = [module for module in _norms(plain) if module.track_running_stats and module.running_mean is not None]
    if not norms:
        return
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise DataError(
            f"calibrate() got no batches, but {type(plain).__name__} has {len(norms)} BatchNorms to measure: "
            "give it an iterable of at least one input tensor (a generator that was read before is empty)."
        )
    if not isinstance(first, Tensor):
        raise DataError(
            f"calibrate() needs input tensors (N, C, H, W), but the first batch is a {type(first).__name__}: "
            "if the loader yields (inputs, targets), pass `(inputs for inputs, _ in loader)`."
        )
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    try:
        with _modes(plain, training=set(norms)), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
            for inputs in itertools.chain([first], iterator):
                plain(inputs)
    except BaseException:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let every BatchNorm normalise by its batch and touch no buffer, all else in evaluation mode; restore on leaving.

    This is how a subnet is scored without statistics of its own; use batches of many hundred images.
    """
    norms = [norm for norm in _norms(model) if norm.track_running_stats]
    try:
        with _modes(model, training=set(norms)):
            for norm in norms:
                norm.track_running_stats = False  # in training mode: normalise by the batch, update nothing
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def check_batch_statistics(model: nn.Module) -> None:
    """Make sure, at the end of a `batch_statistics` block, that nothing switched a BatchNorm back meanwhile.

    Raises:
        StaleStatisticsError: a BatchNorm is in evaluation mode, so what was scored used another subnet's statistics.
    """
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and not module.training:
            raise StaleStatisticsError(
                f"{path}: evaluate put this BatchNorm in evaluation mode, so the subnet was scored with the running "
                "statistics of another one; needed: batch statistics; do not call eval() or train() in evaluate"
            )


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextlib.contextmanager
def _modes(model: nn.Module, training: set[_BatchNorm]) -> Iterator[None]:
    """Put `training` in training mode and all other modules in evaluation mode; restore every flag on leaving."""
    before = {module: module.training for module in model.modules()}
    try:
        # Through train(): modules that override it (LeViT's attention) drop what they cached at other widths there.
        model.train()
        model.eval()
        for norm in training:
            norm.training = True
        yield
    finally:
        model.train()
        model.train(before[model])
        for module, flag in before.items():
            module.training = flag
