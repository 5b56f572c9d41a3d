"""Sums over the processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from timm_autoslim.errors import DataError
from timm_autoslim.utils.batches import NEEDED

# Takes tensors of numbers, and returns their sums over all processes that work together, in float64.
Pool = Callable[[Sequence[Tensor]], list[Tensor]]


def pool_alone(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in float64: the sums of a process that works alone."""
    return [tensor.double() for tensor in tensors]


def pool_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums of the tensors over all processes, in float64; every process must call it."""
    flat = torch.cat([tensor.double().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def are_parallel() -> bool:
    """Whether this process is one of several of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the first of torch.distributed, or works alone."""
    return not are_parallel() or dist.get_rank() == 0


def choose_pool(distributed: bool) -> Pool:
    """Return what adds up numbers: over all processes, or nothing to add where there is one."""
    return pool_over_processes if distributed and are_parallel() else pool_alone


def check_every_process(pool: Pool, batches: int, device: torch.device) -> None:
    """Make sure that every process has batches of its own.

    Raises:
        DataError: a process has none; raised in all of them.
    """
    if pool is pool_over_processes:
        (ready,) = pool([torch.tensor(float(batches > 0), device=device)])
        if int(ready) < dist.get_world_size():
            got = f"none in {dist.get_world_size() - int(ready)} of {dist.get_world_size()} processes"
            raise DataError.at("batches", got=got, needed=f"{NEEDED}, in every process")


def copy_from_first(pool: Pool, tensors: Sequence[Tensor]) -> None:
    """Give the tensors of all processes, in place, the values that they have in the first one."""
    if pool is pool_over_processes:
        for tensor in tensors:
            values = tensor.contiguous()  # what broadcast takes
            dist.broadcast(values, 0)
            tensor.copy_(values)
