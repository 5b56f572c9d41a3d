"""What is kept of one tensor: taken out, and how its gradient finds the way back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# What is kept of one axis: None for all of it, else runs of (start, length) in ascending order.
Axis = tuple[tuple[int, int], ...] | None

# Above this many blocks one gather or scatter is cheaper than a view for each.
MAX_BLOCKS = 64
# So many parameters, with so many numbers in all, are sliced by one node of autograd's graph. A node costs time, and
# holds the gradients of its slices until it has all of them.
NODE_TENSORS = 16
NODE_NUMBERS = 1 << 18


def take_slice(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
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


def add_slice(whole: Tensor, piece: Tensor, axes: tuple[Axis, ...]) -> None:
    """Add `piece`, of the size that `take_slice(whole, axes)` has, to the places of `whole` that it was taken from."""
    strides, offset = whole.stride(), whole.storage_offset()
    for runs, stride in zip(axes, strides, strict=True):
        if runs is not None:
            if len(runs) > 1:
                break
            offset += runs[0][0] * stride
    else:  # one block, as nearly always: a single view of it
        whole.as_strided(piece.shape, strides, offset).add_(piece)
        return
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


def copy_slice(whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Take a slice that lives on its own: a parameter stays a parameter."""
    piece = _copy(whole, axes)
    if isinstance(whole, nn.Parameter):
        return nn.Parameter(piece, requires_grad=whole.requires_grad)
    return piece


def slice_for_call(tensors: Iterable[tuple[Tensor, tuple[Axis, ...]]]) -> dict[int, Tensor]:
    """Make the slices for a call, by the ids of the whole tensors: of parameters with a gradient, of buffers copies."""
    pieces: dict[int, Tensor] = {}
    trained: dict[int, tuple[Tensor, tuple[Axis, ...]]] = {}
    graph = torch.is_grad_enabled()
    for whole, axes in tensors:
        if id(whole) in pieces or id(whole) in trained:
            continue
        if not isinstance(whole, nn.Parameter):
            pieces[id(whole)] = _copy(whole, axes)
        elif graph and whole.requires_grad and any(axes):
            trained[id(whole)] = whole, axes
        else:
            pieces[id(whole)] = piece = take_slice(whole, axes)
            if piece.requires_grad != whole.requires_grad:
                # Without gradients too: torch's matmul picks its kernel by this flag of the weight.
                piece.requires_grad_(whole.requires_grad)
    for part in _nodes(trained):
        wholes, kept = zip(*(trained[key] for key in part), strict=True)
        pieces.update(zip(part, _Slice.apply(kept, *wholes), strict=True))
    return pieces


def _copy(whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Take a slice that shares no memory with the whole."""
    whole = whole.detach() if whole.requires_grad else whole
    if len(axes) == 1 and axes[0] is not None and len(axes[0]) == 1:  # running statistics and the like
        return whole.narrow_copy(0, *axes[0][0])
    piece = take_slice(whole, axes)
    if whole.is_contiguous():  # its addresses are quicker to compare than its storage
        first = whole.data_ptr()
        shared = first <= piece.data_ptr() < first + max(1, whole.nbytes)
    else:
        shared = piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return piece.clone() if shared else piece


def _nodes(trained: Mapping[int, tuple[Tensor, tuple[Axis, ...]]]) -> Iterator[list[int]]:
    """Share parameters, in their order, out to nodes of the graph."""
    part: list[int] = []
    numbers = 0
    for key, (whole, _) in trained.items():
        numbers += whole.numel()
        if part and (len(part) == NODE_TENSORS or numbers > NODE_NUMBERS):
            yield part
            part, numbers = [], whole.numel()
        part.append(key)
    if part:
        yield part


class _Slice(torch.autograd.Function):
    """`take_slice` of a few parameters, whose backward adds to the kept places of their `.grad` and touches no other.

    Autograd's own way would fill a gradient of the whole parameter with zeros and add all of it. It is still gone where
    the gradient is wanted elsewhere than in `.grad` (`autograd.grad`, a graph of the gradient) or a hook must see it.
    """

    @staticmethod
    def forward(ctx: Any, axes: tuple[tuple[Axis, ...], ...], *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.axes, ctx.wholes = axes, wholes
        return tuple(map(take_slice, wholes, axes))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        handed: list[Tensor | None] = [None] * (1 + len(gradients))
        graph = torch.is_grad_enabled()
        for i, (gradient, whole, axes, (node, _)) in enumerate(
            zip(gradients, ctx.wholes, ctx.axes, ctx.next_functions, strict=True), 1
        ):
            if gradient is None:  # not used in this forward
                continue
            if graph or not _accumulates(whole, node):
                handed[i] = _Pad.apply(gradient, whole, axes)
                continue
            if whole.grad is None:
                whole.grad = torch.zeros_like(whole)
            add_slice(whole.grad, gradient, axes)
        return tuple(handed)


class _Pad(torch.autograd.Function):
    """The gradient of a whole parameter from that of its slice: zero where nothing was kept."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, whole: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        ctx.axes = axes
        padded = torch.zeros_like(whole, dtype=gradient.dtype)
        add_slice(padded, gradient, axes)
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return take_slice(gradient, ctx.axes), None, None


def _accumulates(whole: Tensor, node: Any) -> bool:
    """Whether the backward that runs now adds to `whole.grad`, and nothing looks at what it adds."""
    if whole._backward_hooks or whole._post_accumulate_grad_hooks:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch's answer in autograd.grad()
        return False
