"""One slicing code: what a subnet keeps of every tensor, applied for the length of one call or for good."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def within(runs: Iterable[tuple[int, int]], old: int | Sequence[Sequence[int]] | None) -> int | list[list[int]]:
    """Return what runs of the channels that `old` kept of an axis keep of the axis itself: runs, or the first few."""
    index = [i for start, n in runs for i in range(start, start + n)]
    if isinstance(old, Sequence):
        kept = [i for start, n in old for i in range(start, start + n)]
        index = [kept[i] for i in index]
    found: list[list[int]] = []
    for i in index:
        if found and sum(found[-1]) == i:
            found[-1][1] += 1
        else:
            found.append([i, 1])
    return found[0][1] if len(found) == 1 and not found[0][0] else found


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


def _located(model: nn.Module, slices: Slices) -> list[tuple[dict[str, Any], str, Tensor, tuple[Axis, ...]]]:
    """Find the tensors that `slices` names: the dict that holds each, its key there, the tensor, what is kept of it."""
    found: list[tuple[dict[str, Any], str, Tensor, tuple[Axis, ...]]] = []
    for name, axes in slices.tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model
        for part in path.split(".") if path else ():
            module = module._modules[part]  # type: ignore[assignment]
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        store = next((s for s in stores if leaf in s), None)
        if store is None:
            raise KeyError(name)
        found.append((store, leaf, store[leaf], axes))
    return found


def forget(model: nn.Module, changed: Iterable[str]) -> list[tuple[dict[str, Any], str, dict[Any, Any]]]:
    """Empty what the modules of changed tensors keep from call to call in dicts, such as LeViT's attention biases.

    Returns:
        What was found: the dict that holds each cache, its key there, and the cache.
    """
    found = []
    for path in {name.rpartition(".")[0] for name in changed}:
        own = model.get_submodule(path).__dict__
        for name, value in own.items():
            if type(value) is dict and not name.startswith("_") and any(isinstance(v, Tensor) for v in value.values()):
                found.append((own, name, value))
    for own, name, _ in found:
        own[name] = {}
    return found


@contextlib.contextmanager
def applied(model: nn.Module, slices: Slices) -> Iterator[None]:
    """Run `model` as a subnet inside the block: its tensors are replaced by slices of themselves, then put back.

    Parameters stay connected: gradients of the slices reach the whole parameters. Buffers are copies, so that a
    narrower subnet never moves the running statistics of the widest. What modules cache at one width serves no other.
    """
    located = _located(model, slices)
    restored: list[tuple[str, Value]] = []
    done: dict[int, Tensor] = {}
    caches = forget(model, slices.tensors)
    try:
        for store, leaf, whole, axes in located:
            if id(whole) not in done:
                done[id(whole)] = _connected(whole, axes)
            store[leaf] = done[id(whole)]
        for path, value in slices.attributes.items():
            restored.append((path, set_attribute(model, path, value)))
        yield
    finally:
        forget(model, slices.tensors)
        for own, name, cache in caches:
            own[name] = cache
        for store, leaf, whole, _ in located:
            store[leaf] = whole
        for path, value in reversed(restored):
            set_attribute(model, path, value)


def _connected(whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """A slice for the length of a call: of a parameter a view with a gradient, of a buffer a copy."""
    piece = take(whole, axes)
    if not isinstance(whole, nn.Parameter):
        return piece.detach().clone()
    if piece.requires_grad != whole.requires_grad:
        # Without gradients too: torch's matmul picks its kernel by this flag of the weight.
        piece.requires_grad_(whole.requires_grad)
    return piece


def _piece(whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """A slice that lives on its own: a parameter stays a parameter."""
    piece = take(whole.detach(), axes)
    if piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
        piece = piece.clone()
    if isinstance(whole, nn.Parameter):
        return nn.Parameter(piece, requires_grad=whole.requires_grad)
    return piece


def extract(model: M, slices: Slices) -> M:
    """Return a copy of `model` that keeps only what `slices` keeps; no second full copy of the weights is made."""
    memo: dict[int, object] = {}
    for _, _, whole, axes in _located(model, slices):
        if id(whole) not in memo:
            memo[id(whole)] = _piece(whole, axes)
    for module in model.modules():  # activations that modules keep: autograd's results cannot be copied
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    plain = copy.deepcopy(model, memo)
    forget(plain, slices.tensors)
    for path, value in slices.attributes.items():
        set_attribute(plain, path, value)
    return plain


def shrink_(model: nn.Module, slices: Slices) -> None:
    """Keep of `model`, in place and for good, only what `slices` keeps; tied parameters stay tied."""
    pieces: dict[int, Tensor] = {}
    for store, leaf, whole, axes in _located(model, slices):
        if id(whole) not in pieces:
            pieces[id(whole)] = _piece(whole, axes)
        store[leaf] = pieces[id(whole)]
    for path, value in slices.attributes.items():
        set_attribute(model, path, value)
