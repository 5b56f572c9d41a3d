"""One slicing code: what a subnet keeps of every tensor, applied for the length of one call or for good."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# What is kept of one axis: None for all of it, else runs of (start, length) in ascending order.
Axis = tuple[tuple[int, int], ...] | None
Value = int | float | tuple[int, ...]
M = TypeVar("M", bound=nn.Module)

# Above this many runs one gather is cheaper than a concatenation of views.
MAX_RUNS = 8


@dataclass(frozen=True)
class Slices:
    """What a subnet keeps.

    Attributes:
        tensors: by the tensor's name in the model (`layer1.0.conv1.weight`), one `Axis` for each dimension.
        attributes: by path (`layer1.0.conv1.groups`, `feature_info.0.num_chs`), the value in the subnet.
    """

    tensors: Mapping[str, tuple[Axis, ...]]
    attributes: Mapping[str, Value]


def take(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Keep the runs of each axis. Differentiable; contiguous, so that the same kernels run as on an extracted model."""
    for dim, runs in enumerate(axes):
        if runs is None:
            continue
        if len(runs) == 1:
            tensor = tensor.narrow(dim, *runs[0])
        elif len(runs) <= MAX_RUNS:
            tensor = torch.cat([tensor.narrow(dim, start, length) for start, length in runs], dim)
        else:
            index = torch.cat([torch.arange(start, start + length) for start, length in runs])
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _store(module: nn.Module, leaf: str) -> dict[str, Any]:
    for store in (module._parameters, module._buffers, module.__dict__):
        if leaf in store:
            return store
    raise KeyError(leaf)


def set_attribute(model: nn.Module, path: str, value: Value) -> Value:
    """Set `model.<path>` and return what it was; parts of the path may be indexes of lists, tuples and dicts."""
    target: Any = model
    *parents, leaf = path.split(".")
    for part in parents:
        target = _child(target, part)
    if isinstance(target, tuple):  # a tuple is replaced whole, in its own parent
        index = int(leaf)
        old: Value = target[index]
        whole = (*target[:index], value, *target[index + 1 :])
        set_attribute(model, ".".join(parents), whole)
        return old
    before: Value = _child(target, leaf)
    if isinstance(target, list):
        target[int(leaf)] = value
    elif isinstance(target, dict):
        target[leaf] = value
    else:
        target.__dict__[leaf] = value  # nn.Module.__setattr__ is slow, and there is nothing here for it to register
    return before


def _child(target: Any, part: str) -> Any:
    if isinstance(target, nn.Module) and part in target._modules:
        return target._modules[part]
    if isinstance(target, (list, tuple)):
        return target[int(part)]
    if isinstance(target, dict):
        return target[part]
    return target.__dict__[part]


@contextlib.contextmanager
def applied(model: nn.Module, slices: Slices) -> Iterator[None]:
    """Run `model` as a subnet inside the block: its tensors are replaced by slices of themselves, then put back.

    Parameters stay connected: gradients of the slices reach the whole parameters. Buffers are copies, so that a
    narrower subnet never moves the running statistics of the widest.
    """
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    restored: list[tuple[str, Value]] = []
    done: dict[int, Tensor] = {}
    try:
        for name, axes in slices.tensors.items():
            module, leaf = _owner(model, name)
            store = _store(module, leaf)
            whole = store[leaf]
            assert isinstance(whole, Tensor)
            if id(whole) not in done:
                piece = take(whole, axes)
                done[id(whole)] = piece if isinstance(whole, nn.Parameter) else piece.detach().clone()
            swapped.append((store, leaf, whole))
            store[leaf] = done[id(whole)]
        for path, value in slices.attributes.items():
            restored.append((path, set_attribute(model, path, value)))
        yield
    finally:
        for store, leaf, whole in reversed(swapped):
            store[leaf] = whole
        for path, value in reversed(restored):
            set_attribute(model, path, value)


def _piece(whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """A slice that lives on its own: a parameter stays a parameter."""
    piece = take(whole.detach(), axes).clone()
    if isinstance(whole, nn.Parameter):
        return nn.Parameter(piece, requires_grad=whole.requires_grad)
    return piece


def extract(model: M, slices: Slices) -> M:
    """Return a copy of `model` that keeps only what `slices` keeps; no second full copy of the weights is made."""
    memo: dict[int, object] = {}
    for name, axes in slices.tensors.items():
        module, leaf = _owner(model, name)
        whole = _store(module, leaf)[leaf]
        assert isinstance(whole, Tensor)
        if id(whole) not in memo:
            memo[id(whole)] = _piece(whole, axes)
    plain = copy.deepcopy(model, memo)
    for path, value in slices.attributes.items():
        set_attribute(plain, path, value)
    return plain


def shrink_(model: nn.Module, slices: Slices) -> None:
    """Keep of `model`, in place and for good, only what `slices` keeps; tied parameters stay tied."""
    pieces: dict[int, Tensor] = {}
    places: list[tuple[dict[str, Any], str, int]] = []
    keep = []  # the ids are only unique while the tensors live
    for name, axes in slices.tensors.items():
        module, leaf = _owner(model, name)
        store = _store(module, leaf)
        whole = store[leaf]
        assert isinstance(whole, Tensor)
        keep.append(whole)
        if id(whole) not in pieces:
            pieces[id(whole)] = _piece(whole, axes)
        places.append((store, leaf, id(whole)))
    for store, leaf, key in places:
        store[leaf] = pieces[key]
    for path, value in slices.attributes.items():
        set_attribute(model, path, value)
