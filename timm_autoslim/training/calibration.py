"""BatchNorm statistics: measure those of a plain model, or normalise by the batch while a subnet is scored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_autoslim.errors import DataError, StaleStatisticsError


def calibrate(plain: nn.Module, batches: Iterable[Tensor], *, distributed: bool = False) -> None:
    """Measure the running statistics of every BatchNorm anew, as the average over `batches`.

    A subnet's statistics are not those of the network that it was cut from, and with foreign ones its accuracy is near
    chance. The average is cumulative, each batch counting the same (Yu and Huang, "Universally Slimmable Networks",
    arXiv 1903.05134, "Post-Statistics of Batch Normalization"). Only the BatchNorms run in training mode: dropout and
    drop-path stay off. If anything fails on the way, the model is left with the statistics that it had.

    Args:
        plain: the model, changed in place; one without running statistics is left alone.
        batches: inputs (N, C, H, W) on the model's device, all of the same size; a few thousand images are plenty.
        distributed: the processes of torch.distributed measure together, each on batches of its own, and end with the
            same statistics: the average over the batches of all of them. Without it every process is on its own, and
            should be given the same batches. `SyncBatchNorm` joins the batches of all processes in any case.

    Raises:
        DataError: `batches` is empty (with `distributed`, in every process), its first item is not a tensor, or a model
            with `SyncBatchNorm` is given unequal numbers of batches.
    """
    norms = [module for module in _norms(plain) if module.track_running_stats and module.running_mean is not None]
    if not norms:
        return
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    joined = several and any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    checked = _checked(batches)
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    device = next(iter(kept[0].values())).device
    try:
        with _modes(plain, training=set(norms)), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
            count = 0
            for inputs in _in_step(checked, device) if joined else checked:
                plain(inputs)
                count += 1
        if distributed and several:
            count = _average_over_processes(norms, count, device)
        if not count:
            raise DataError(
                f"calibrate() got no batches, but {type(plain).__name__} has {len(norms)} BatchNorms to measure: "
                "give it an iterable of at least one input tensor (a generator that was read before is empty)."
            )
    except BaseException:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _checked(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for index, inputs in enumerate(batches):
        if not index and not isinstance(inputs, Tensor):
            raise DataError(
                f"calibrate() needs input tensors (N, C, H, W), but the first batch is a {type(inputs).__name__}: "
                "if the loader yields (inputs, targets), pass `(inputs for inputs, _ in loader)`."
            )
        yield inputs


def _in_step(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield batches as long as every process has one; SyncBatchNorm would wait forever for a process that has none."""
    while True:
        inputs = next(batches, None)
        ready = torch.tensor([float(inputs is not None)], device=device)
        dist.all_reduce(ready)  # of how many processes
        if not ready:
            return
        if inputs is None or ready != dist.get_world_size():
            raise DataError(
                "calibrate() got a model with SyncBatchNorm, and not as many batches in each process: needed equal "
                "numbers; leave out what is left over, or convert the model without SyncBatchNorm."
            )
        yield inputs


def _average_over_processes(norms: list[_BatchNorm], count: int, device: torch.device) -> int:
    """Weigh every process's statistics by its batches; returns how many batches there were in all."""
    parts = [torch.tensor([float(count)], dtype=torch.float64, device=device)]
    for norm in norms:
        mean, var, batches = (norm.get_buffer(n) for n in ("running_mean", "running_var", "num_batches_tracked"))
        parts += [(x.double() * batches).flatten() for x in (mean, var)] + [batches.double().view(1)]
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    sums = iter(torch.split(flat, [len(part) for part in parts]))
    total = int(next(sums))
    for norm in norms:
        mean, var, batches = next(sums), next(sums), next(sums)
        if batches:  # else nothing reached this one, in no process
            norm.get_buffer("running_mean").copy_(mean / batches)
            norm.get_buffer("running_var").copy_(var / batches)
            norm.get_buffer("num_batches_tracked").fill_(int(batches))
    return total


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
