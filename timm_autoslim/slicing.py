"""One slicing code: what a subnet keeps of every tensor, applied for the length of one call or for good."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

# What is kept of one axis: None for all of it, else runs of (start, length) in ascending order.
Axis = tuple[tuple[int, int], ...] | None
Value = int | float | tuple[int, ...] | list[int]
M = TypeVar("M", bound=nn.Module)

# Above this many blocks one gather or scatter is cheaper than a view for each.
MAX_BLOCKS = 64


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


def take(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Keep the runs of each axis. Differentiable; contiguous, so that the same kernels run as on an extracted model."""
    layout = _layout(tensor)
    for dim, runs in enumerate(axes):
        if runs is None:
            continue
        if len(runs) == 1:
            tensor = tensor.narrow(dim, *runs[0])
        elif _regular(runs):
            tensor = _blocks(tensor, dim, runs).flatten(dim, dim + 1)
        elif len(runs) <= MAX_BLOCKS:
            tensor = torch.cat([tensor.narrow(dim, start, length) for start, length in runs], dim)
        else:
            tensor = tensor.index_select(dim, _index(runs).to(tensor.device))
    return tensor.contiguous(memory_format=layout)


def add(whole: Tensor, piece: Tensor, axes: tuple[Axis, ...]) -> None:
    """Add `piece`, of the size that `take(whole, axes)` has, to the places of `whole` that it was taken from."""
    irregular = [runs for runs in axes if runs is not None and len(runs) > 1 and not _regular(runs)]
    if math.prod(map(len, irregular)) > MAX_BLOCKS:
        kept = [((0, n),) if runs is None else runs for n, runs in zip(whole.shape, axes, strict=True)]
        last = len(kept) - 1
        index = tuple(_index(runs).to(whole.device).view(-1, *[1] * (last - dim)) for dim, runs in enumerate(kept))
        whole.index_put_(index, whole[index] + piece)
        return
    pairs = [(whole, piece)]
    for dim, runs in reversed(list(enumerate(axes))):  # from the last, so that blocks do not move the dims to come
        if runs is None:
            continue
        if len(runs) == 1:
            pairs = [(big.narrow(dim, *runs[0]), small) for big, small in pairs]
        elif _regular(runs):
            split = (len(runs), runs[0][1])
            pairs = [(_blocks(big, dim, runs), small.unflatten(dim, split)) for big, small in pairs]  # type: ignore[no-untyped-call]
        else:
            lengths = [n for _, n in runs]
            pairs = [
                (big.narrow(dim, *run), part)
                for big, small in pairs
                for run, part in zip(runs, torch.split(small, lengths, dim), strict=True)
            ]
    for big, small in pairs:
        big.add_(small)


def _layout(tensor: Tensor) -> torch.memory_format:
    """Channels last if the tensor is so and not contiguous as well, so that its slices stay as it is."""
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _regular(runs: tuple[tuple[int, int], ...]) -> bool:
    """Whether the runs are of one length and evenly spaced, such as the heads of a fused projection."""
    (first, length), step = runs[0], runs[1][0] - runs[0][0]
    return all(run == (first + i * step, length) for i, run in enumerate(runs))


def _blocks(tensor: Tensor, dim: int, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """View regular runs of one dimension as two: (runs, length of a run)."""
    start, length = runs[0]
    inside = tensor.narrow(dim, start, runs[-1][0] + length - start)
    return inside.unfold(dim, length, runs[1][0] - start).movedim(-1, dim + 1)


def _index(runs: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.tensor([i for start, length in runs for i in range(start, start + length)])


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
    if isinstance(target, (tuple, list)):  # replaced whole, in its own parent: a list may be that of a configuration
        index = int(leaf)
        old: Value = target[index]
        whole: Any = (*target[:index], value, *target[index + 1 :])
        set_attribute(model, ".".join(parents), whole if isinstance(target, tuple) else list(whole))
        return old
    before: Value = _child(target, leaf)
    if isinstance(target, dict):
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
        stores: tuple[dict[str, Any], ...] = ()
        if module is not None:  # not its truth: a module may have a length
            stores = (module._parameters, module._buffers, module.__dict__)
        for leaf, axes in members:
            store = next((s for s in stores if leaf in s), None)
            if store is None or module is None:
                raise KeyError(".".join((*parts, leaf)))
            found.append(_Located(module, store, leaf, store[leaf], axes))
    return found


def forget(modules: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str, dict[Any, Any]]]:
    """Empty what modules keep from call to call in dicts of tensors, such as LeViT's attention biases.

    Returns:
        What was found: the dict that holds each cache, its key there, and the cache.
    """
    found = []
    for module in modules:
        own = module.__dict__
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
    located = _locate(model, slices)
    modules = dict.fromkeys(place.module for place in located)
    restored: list[tuple[str, Value]] = []
    done: dict[int, Tensor] = {}
    caches = forget(modules)
    try:
        for _, store, leaf, whole, axes in located:
            if id(whole) not in done:
                done[id(whole)] = _connected(whole, axes)
            store[leaf] = done[id(whole)]
        for path, value in slices.attributes.items():
            restored.append((path, set_attribute(model, path, value)))
        yield
    finally:
        forget(modules)
        for own, name, cache in caches:
            own[name] = cache
        for _, store, leaf, whole, _ in located:
            store[leaf] = whole
        for path, value in reversed(restored):
            set_attribute(model, path, value)


def _connected(whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """A slice for the length of a call: of a parameter a view with a gradient, of a buffer a copy."""
    if not isinstance(whole, nn.Parameter):
        return take(whole.detach(), axes).clone()
    if whole.requires_grad and torch.is_grad_enabled() and any(axes):
        piece: Tensor = _Slice.apply(whole, axes)
        return piece
    piece = take(whole, axes)
    if piece.requires_grad != whole.requires_grad:
        # Without gradients too: torch's matmul picks its kernel by this flag of the weight.
        piece.requires_grad_(whole.requires_grad)
    return piece


class _Slice(torch.autograd.Function):
    """`take` of a parameter, whose backward adds to the kept places of the parameter's `.grad` and touches no other.

    Autograd's own way would fill a gradient of the whole parameter with zeros and add all of it. It is still gone where
    the gradient is wanted elsewhere than in `.grad` (`autograd.grad`, a graph of the gradient) or a hook must see it.
    """

    @staticmethod
    def forward(ctx: Any, whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        ctx.whole, ctx.axes = whole, axes
        return take(whole, axes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        whole = ctx.whole
        if torch.is_grad_enabled() or not _accumulates(whole, ctx.next_functions[0][0]):
            return _Pad.apply(gradient, whole, ctx.axes), None
        if whole.grad is None:
            whole.grad = torch.zeros_like(whole)
        add(whole.grad, gradient, ctx.axes)
        return None, None


class _Pad(torch.autograd.Function):
    """The gradient of a whole parameter from that of its slice: zero where nothing was kept."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        ctx.axes = axes
        padded = torch.zeros_like(whole, dtype=gradient.dtype)
        add(padded, gradient, axes)
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return take(gradient, ctx.axes), None, None


def _accumulates(whole: Tensor, node: Any) -> bool:
    """Whether the backward that runs now adds to `whole.grad`, and nothing looks at what it adds."""
    if whole._backward_hooks or whole._post_accumulate_grad_hooks:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch's answer in autograd.grad()
        return False


def _piece(whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """A slice that lives on its own: a parameter stays a parameter."""
    piece = take(whole.detach(), axes)
    if whole.is_contiguous():  # its addresses are quicker to compare than its storage
        first = whole.data_ptr()
        shared = first <= piece.data_ptr() < first + max(1, whole.nbytes)
    else:
        shared = piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    if shared:
        piece = piece.clone()
    if isinstance(whole, nn.Parameter):
        return nn.Parameter(piece, requires_grad=whole.requires_grad)
    return piece


def extract(model: M, slices: Slices) -> M:
    """Return a copy of `model` that keeps only what `slices` keeps; no second full copy of the weights is made."""
    memo: dict[int, object] = {}
    for place in _locate(model, slices):
        if id(place.whole) not in memo:
            memo[id(place.whole)] = _piece(place.whole, place.axes)
    for module in model.modules():  # activations that modules keep: autograd's results cannot be copied
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    plain = copy.deepcopy(model, memo)
    forget({place.module for place in _locate(plain, slices)})
    for path, value in slices.attributes.items():
        set_attribute(plain, path, value)
    return plain


def shrink_(model: nn.Module, slices: Slices) -> None:
    """Keep of `model`, in place and for good, only what `slices` keeps; tied parameters stay tied."""
    located = _locate(model, slices)
    times = Counter(id(place.whole) for place in located)
    tied: dict[int, tuple[Tensor, Tensor]] = {}
    while located:  # each tensor is given up for its slice, whose memory the next slices can take
        _, store, leaf, whole, axes = located.pop()
        piece = tied[id(whole)][1] if id(whole) in tied else _piece(whole, axes)
        if times[id(whole)] > 1:
            tied[id(whole)] = (whole, piece)
        store[leaf] = piece
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, value in slices.attributes.items():
        above, _, leaf = path.rpartition(".")
        if above in modules:
            modules[above].__dict__[leaf] = value
        else:
            set_attribute(model, path, value)
