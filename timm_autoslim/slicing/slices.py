"""One slicing code: what a subnet keeps of every tensor, applied for the length of one call or for good."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from timm_autoslim.slicing.attributes import Value, restore_attributes, set_attributes
from timm_autoslim.slicing.tensors import Axis, copy_slice, slice_for_call

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Slices:
    """What a subnet keeps.

    Attributes:
        tensors: by the tensor's name in the model (`layer1.0.conv1.weight`), one `Axis` for each dimension.
        attributes: by path (`layer1.0.conv1.groups`, `feature_info.0.num_chs`), the value in the subnet.
    """

    tensors: Mapping[str, tuple[Axis, ...]]
    attributes: Mapping[str, Value]

    @cached_property
    def _by_module(self) -> list[tuple[list[str], list[tuple[str, tuple[Axis, ...]]]]]:
        """The tensors of each module: the parts of its path, and for each tensor its own name and what is kept."""
        found: dict[str, list[tuple[str, tuple[Axis, ...]]]] = {}
        for name, axes in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            found.setdefault(path, []).append((leaf, axes))
        return [(path.split(".") if path else [], members) for path, members in found.items()]


def compose_runs(runs: Iterable[tuple[int, int]], old: int | Sequence[Sequence[int]] | None) -> int | list[list[int]]:
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


class _Located(NamedTuple):
    """A tensor that is sliced: its module, the dict of it that holds it, its key there, itself, what is kept."""

    module: nn.Module
    store: dict[str, Any]
    leaf: str
    whole: Tensor
    axes: tuple[Axis, ...]


def _locate(model: nn.Module, slices: Slices) -> list[_Located]:
    """Find the tensors that `slices` names."""
    found: list[_Located] = []
    for parts, members in slices._by_module:
        module: nn.Module | None = model
        for part in parts:
            module = None if module is None else module._modules.get(part)
        if module is None:
            raise KeyError(".".join((*parts, members[0][0])))
        for leaf, axes in members:
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
            for store in stores:
                if leaf in store:
                    found.append(_Located(module, store, leaf, store[leaf], axes))
                    break
            else:
                raise KeyError(".".join((*parts, leaf)))
    return found


def clear_caches(modules: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str, dict[Any, Any]]]:
    """Empty what modules keep from call to call in dicts of tensors, such as LeViT's attention biases.

    Returns:
        What was found: the dict that holds each cache, its key there, and the cache.
    """
    found = []
    for module in modules:
        if type(module).__module__.startswith("torch.nn.modules."):
            continue  # these keep nothing so, and are many
        attributes = module.__dict__
        for name, value in attributes.items():
            if type(value) is dict and not name.startswith("_") and any(isinstance(v, Tensor) for v in value.values()):
                found.append((attributes, name, value))
    for store, name, _ in found:
        store[name] = {}
    return found


@contextlib.contextmanager
def apply_slices(model: nn.Module, slices: Slices) -> Iterator[None]:
    """Run `model` as a subnet inside the block: its tensors are replaced by slices of themselves, then put back.

    Parameters stay connected: gradients of the slices reach the whole parameters. Buffers are copies, so that a
    narrower subnet never moves the running statistics of the widest. What modules cache at one width serves no other.
    """
    located = _locate(model, slices)
    modules = dict.fromkeys(place.module for place in located)
    pieces = slice_for_call((place.whole, place.axes) for place in located)
    changed: list[tuple[Any, Any, Any]] = []
    caches = clear_caches(modules)
    try:
        changed = set_attributes(model, slices.attributes)
        for _, store, leaf, whole, _ in located:
            store[leaf] = pieces[id(whole)]
        yield
    finally:
        clear_caches(modules)
        for store, name, cache in caches:
            store[name] = cache
        for _, store, leaf, whole, _ in located:
            store[leaf] = whole
        restore_attributes(changed)


def extract_model(model: M, slices: Slices) -> M:
    """Return a copy of `model` that keeps only what `slices` keeps; no second full copy of the weights is made."""
    memo: dict[int, object] = {}
    for place in _locate(model, slices):
        if id(place.whole) not in memo:
            memo[id(place.whole)] = copy_slice(place.whole, place.axes)
    for module in model.modules():  # activations that modules keep: autograd's results cannot be copied
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    plain = copy.deepcopy(model, memo)
    clear_caches({place.module for place in _locate(plain, slices)})
    set_attributes(plain, slices.attributes)
    return plain


def shrink_model(model: nn.Module, slices: Slices) -> None:
    """Keep of `model`, in place and for good, only what `slices` keeps; tied parameters stay tied."""
    located = _locate(model, slices)
    times = Counter(id(place.whole) for place in located)
    recurrent = {place.module for place in located if isinstance(place.module, nn.RNNBase)}
    tied: dict[int, tuple[Tensor, Tensor]] = {}
    while located:  # each tensor is given up for its slice, whose memory the next slices can take
        _, store, leaf, whole, axes = located.pop()
        piece = tied[id(whole)][1] if id(whole) in tied else copy_slice(whole, axes)
        if times[id(whole)] > 1:
            tied[id(whole)] = (whole, piece)
        store[leaf] = piece
    for module in recurrent:  # they hold their weights twice; TorchScript reads the list
        module._init_flat_weights()
    set_attributes(model, slices.attributes)
