"""BatchNorm statistics: measure those of a model, or normalise by the batch while a subnet is scored."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_autoslim.errors import DataError, StaleStatisticsError
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.utils.arguments import check_flag, check_module
from timm_autoslim.utils.batches import check_inputs, join_singles, make_empty_error, run_batch
from timm_autoslim.utils.processes import are_parallel, pool_over_processes
from timm_autoslim.utils.restoring import restoring, restoring_on_error


def calibrate(model: nn.Module, batches: Iterable[Any], *, distributed: bool = False) -> None:
    """Measure the running statistics of every BatchNorm again, as the average over `batches`.

    A subnet has other statistics than the model that it was extracted from; with the wrong ones its accuracy is near
    chance. The average is cumulative, each batch counting the same (Yu and Huang, "Universally Slimmable Networks",
    arXiv 1903.05134, "Post-Statistics of Batch Normalization"). Only the BatchNorms run in training mode: dropout and
    drop path stay off. After an error the model has the statistics that it had before.

    Args:
        model: the model, changed in place; one without running statistics is left alone.
        batches: inputs (N, C, H, W) on the model's device, all of the same size; a few thousand images are plenty.
            Several inputs are a tuple or, by name, a dict, as `convert` takes them. A batch of one image is joined to
            its neighbour where a BatchNorm would get a single value per channel, which has no variance.
        distributed: the processes of torch.distributed measure together, each on batches of its own, and end with the
            same statistics: the average over the batches of all of them. Otherwise each process measures alone, and
            should get the same batches. `SyncBatchNorm` joins the batches of all processes in any case.

    Raises:
        DataError: `batches` is no iterable, or is a tensor itself; it is empty (with `distributed`, in every process);
            a batch is none of the model's inputs, has no images, or is not finite; there is one image in all, and it
            has no variance; or a model with `SyncBatchNorm` gets
            more batches in one process than in another.
        ConfigError: another argument is of the wrong type.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import calibrate, convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> model = supernet.extract(supernet.space.uniform(0.5))
        >>> calibrate(model, (torch.randn(8, 3, 32, 32) for _ in range(2)))
        >>> int(model.bn1.num_batches_tracked)
        2
    """
    norms = [norm for norm in _list_norms(model) if norm.track_running_stats and norm.running_mean is not None]
    check_flag("distributed", distributed)
    inputs = check_inputs(model, batches)
    if not norms:
        return
    parallel = are_parallel()
    synchronized = parallel and any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    if synchronized:
        inputs = _iterate_together(inputs, _get_device(norms))
    else:
        inputs = join_singles(inputs, functools.partial(lacks_variance, model))
    with _restore_statistics_on_error(norms):
        count = _measure_statistics(model, norms, inputs)
        if distributed and parallel:
            count = _average_over_processes(norms, count)
        if not count:
            raise make_empty_error(f"none, and {type(model).__name__} has {len(norms)} BatchNorms to measure")


def _measure_statistics(model: nn.Module, norms: list[_BatchNorm], batches: Iterable[Any]) -> int:
    """Replace the statistics by the average over these batches; return how many batches there were."""
    momenta = [norm.momentum for norm in norms]
    count = 0

    def restore() -> None:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    with restoring(restore), _set_modes(model, training=set(norms)), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
        for inputs in batches:
            run_batch(model, count, inputs)
            count += 1
    return count


def _restore_statistics_on_error(norms: list[_BatchNorm]) -> contextlib.AbstractContextManager[None]:
    buffers = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]

    def restore() -> None:
        for norm, values in zip(norms, buffers, strict=True):
            for name, value in values.items():
                norm.get_buffer(name).copy_(value)

    return restoring_on_error(restore)


def _get_device(norms: list[_BatchNorm]) -> torch.device:
    return next(norms[0].buffers(recurse=False)).device


def _iterate_together(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Yield batches while every process has one; SyncBatchNorm would wait forever for a process that has none.

    Raises:
        DataError: one process has fewer batches than another.
    """
    while True:
        inputs = next(batches, None)
        ready = torch.tensor([float(inputs is not None)], device=device)
        dist.all_reduce(ready)  # how many processes have a batch
        if not ready:
            return
        if inputs is None or ready != dist.get_world_size():
            raise DataError.at(
                "batches",
                got="a model with SyncBatchNorm, and more batches in one process than in another",
                needed="equal numbers",
                remedy="leave out the batches that only some processes have, or use a model without SyncBatchNorm",
            )
        yield inputs


def _average_over_processes(norms: list[_BatchNorm], count: int) -> int:
    """Average the statistics over the batches of all processes; return how many batches there were in all."""
    parts = [torch.tensor([float(count)], dtype=torch.float64, device=_get_device(norms))]
    for norm in norms:
        mean, var, batches = (norm.get_buffer(n) for n in ("running_mean", "running_var", "num_batches_tracked"))
        parts += [(x.double() * batches).flatten() for x in (mean, var)] + [batches.double().view(1)]
    sums = iter(pool_over_processes(parts))
    total = int(next(sums))
    for norm in norms:
        mean, var, batches = next(sums), next(sums), next(sums)
        if batches:  # else no input reached this BatchNorm in any process
            norm.get_buffer("running_mean").copy_(mean / batches)
            norm.get_buffer("running_var").copy_(var / batches)
            norm.get_buffer("num_batches_tracked").fill_(int(batches))
    return total


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let every BatchNorm normalise by the batch and update no buffer; all other modules are in evaluation mode.

    So a subnet can be scored that has no running statistics of its own; use batches of several hundred images. At the
    end of the block all modules are as they were before.

    Args:
        model: the model, such as `supernet.model`.

    Raises:
        ConfigError: the model is no module.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import batch_statistics, convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> images, narrowest = torch.randn(8, 3, 32, 32), supernet.space.min()
        >>> with torch.no_grad(), batch_statistics(supernet.model):
        ...     logits = supernet(images, narrowest)
        >>> logits.shape
        torch.Size([8, 10])
    """
    norms = [norm for norm in _list_norms(model) if norm.track_running_stats]

    def restore() -> None:
        for norm in norms:
            norm.track_running_stats = True

    with restoring(restore), _set_modes(model, training=set(norms)):
        for norm in norms:
            norm.track_running_stats = False  # in training mode: normalise by the batch, update nothing
        yield


def lacks_variance(model: nn.Module, inputs: Any) -> bool:
    """Whether a BatchNorm of a model would get a single value per channel of these inputs; one value has no variance.

    Args:
        model: the model; a replica of it runs in evaluation mode.
        inputs: a batch of its inputs.
    """
    counts: list[int] = []

    def count(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = (*inputs, *named.values())[0]  # (N, C, ...)
        counts.append(values.numel() // max(1, values.shape[1]))

    replica = replicate(model, Slices({}, {})).eval()  # the model itself gets no hooks
    for norm in _list_norms(replica):
        norm.register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        run_batch(replica, 0, inputs)
    return 1 in counts


def check_batch_statistics(model: nn.Module) -> None:
    """Make sure, at the end of a `batch_statistics` block, that every BatchNorm still normalises by the batch.

    Raises:
        StaleStatisticsError: a BatchNorm is in evaluation mode, so that another subnet's statistics were used.
    """
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and not module.training:
            raise StaleStatisticsError.at(
                path,
                got="a BatchNorm that evaluate put in evaluation mode, so that the subnet was scored with the running "
                "statistics of another one",
                needed="batch statistics",
                remedy="do not call eval() or train() in evaluate",
            )


def _list_norms(model: nn.Module) -> list[_BatchNorm]:
    check_module("model", model)
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextlib.contextmanager
def _set_modes(model: nn.Module, training: set[_BatchNorm]) -> Iterator[None]:
    """Put `training` in training mode and all other modules in evaluation mode; restore every flag after the block."""
    flags = {module: module.training for module in model.modules()}
    # Modules that override train(), such as LeViT's attention, clear their caches of other widths there.
    overrides = any(type(module).train is not nn.Module.train or "train" in module.__dict__ for module in flags)

    def restore() -> None:
        if overrides:
            model.train()
            model.train(flags[model])
        for module, flag in flags.items():
            module.training = flag

    with restoring(restore):
        if overrides:
            model.train()
            model.eval()
        for module in flags:
            module.training = module in training
        yield
