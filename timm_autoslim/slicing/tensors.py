"""The slice of one tensor: take it, add to it, and send its gradient back to the tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The slice of one axis: None for the full axis, else runs of (start, length) in ascending order.
Axis = tuple[tuple[int, int], ...] | None

# Above this many blocks one gather or scatter is cheaper than a view for each.
MAX_BLOCKS = 64
# So many parameters, with so many numbers in all, are sliced by one node of autograd's graph. A node costs time, and
# holds the gradients of its slices until it has all of them: on a CPU they should still be in its cache then.
NODE_TENSORS, NODE_NUMBERS = 16, 1 << 18
CUDA_NODE_TENSORS, CUDA_NODE_NUMBERS = 64, 1 << 22
_OWN_TYPES = {Tensor, nn.Parameter}  # not those of subclasses, which may do something else in a view
# What one kernel can copy of many tensors.
_NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64}


def take_slice(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return the runs of every axis, one after the other. Differentiable.

    The result is contiguous, so that a subnet runs the same kernels as the extracted model. It may be the tensor
    itself, or share its memory.
    """
    layout = _memory_format(tensor)
    if (
        any(axes)
        and type(tensor) in _OWN_TYPES
        and not (torch.is_grad_enabled() and tensor.requires_grad)
        and not _is_transformed()
    ):
        block = _view_block(tensor, axes)
        if block is not None:  # as nearly always: in one step
            return block if len(axes) == 1 and tensor.stride(0) == 1 else block.contiguous(memory_format=layout)
    for dim, runs in enumerate(axes):
        if runs is None:
            continue
        if len(runs) == 1:
            tensor = tensor.narrow(dim, *runs[0])
        elif _are_regular(runs):
            tensor = _view_blocks(tensor, dim, runs).flatten(dim, dim + 1)
        elif len(runs) <= MAX_BLOCKS:
            tensor = torch.cat([tensor.narrow(dim, start, length) for start, length in runs], dim)
        else:
            tensor = tensor.index_select(dim, _list_indexes(runs).to(tensor.device))
    return tensor.contiguous(memory_format=layout)


def add_slice(tensor: Tensor, slice_: Tensor, axes: tuple[Axis, ...]) -> None:
    """Add `slice_` to the entries of `tensor` that `take_slice(tensor, axes)` returns, in place."""
    block = _view_block(tensor, axes)
    if block is not None:  # as nearly always
        block.add_(slice_)
        return
    irregular = [runs for runs in axes if runs is not None and len(runs) > 1 and not _are_regular(runs)]
    if math.prod(map(len, irregular)) > MAX_BLOCKS:
        _add_by_index(tensor, slice_, axes)
    else:
        _add_by_views(tensor, slice_, axes)


def _view_block(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor | None:
    """Return the entries of the only run of every axis, as one view; None if an axis has several runs."""
    strides = tensor.stride()
    block = _locate_block(axes, tensor.shape, strides)
    return None if block is None else tensor.as_strided(block[0], strides, tensor.storage_offset() + block[1])


@functools.lru_cache(maxsize=1 << 14)
def _locate_block(
    axes: tuple[Axis, ...], sizes: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], int] | None:
    """Return the shape of the block that has one run in every axis, and where it begins; None if there is no such."""
    shape, offset = list(sizes), 0
    for dim, runs in enumerate(axes):
        if runs is not None:
            if len(runs) > 1:
                return None
            start, shape[dim] = runs[0]
            offset += start * strides[dim]
    return tuple(shape), offset


def _add_to_blocks(blocks: list[Tensor], parts: list[Tensor]) -> None:
    """Add to each block its part. On a GPU one kernel adds to many vectors; blocks with gaps take one each."""
    for is_vector in (True, False):
        indexes = [i for i, block in enumerate(blocks) if (block.dim() == 1) == is_vector]
        if indexes:
            torch._foreach_add_([blocks[i] for i in indexes], [parts[i] for i in indexes])


def _add_by_index(tensor: Tensor, slice_: Tensor, axes: tuple[Axis, ...]) -> None:
    """Add a slice by one index for each axis, where there are many runs."""
    full = [((0, n),) if runs is None else runs for n, runs in zip(tensor.shape, axes, strict=True)]
    last = len(full) - 1
    index = tuple(_list_indexes(runs).to(tensor.device).view(-1, *[1] * (last - dim)) for dim, runs in enumerate(full))
    tensor.index_put_(index, tensor[index] + slice_)


def _add_by_views(tensor: Tensor, slice_: Tensor, axes: tuple[Axis, ...]) -> None:
    """Add a slice by one view for each combination of runs, where there are few."""
    pairs = [(tensor, slice_)]  # views of the tensor, and the part of the slice that is added to each
    for dim, runs in reversed(list(enumerate(axes))):  # from the last, so that blocks do not move the dims to come
        if runs is None:
            continue
        if len(runs) == 1:
            pairs = [(view.narrow(dim, *runs[0]), part) for view, part in pairs]
        elif _are_regular(runs):
            split = (len(runs), runs[0][1])
            pairs = [(_view_blocks(view, dim, runs), part.unflatten(dim, split)) for view, part in pairs]  # type: ignore[no-untyped-call]
        else:
            lengths = [n for _, n in runs]
            pairs = [
                (view.narrow(dim, *run), subpart)
                for view, part in pairs
                for run, subpart in zip(runs, torch.split(part, lengths, dim), strict=True)
            ]
    for view, part in pairs:
        view.add_(part)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return channels_last if the tensor is so and not also contiguous; its slices then get the same format."""
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _are_regular(runs: tuple[tuple[int, int], ...]) -> bool:
    """Return whether the runs have one length and are evenly spaced, such as the heads of a fused projection."""
    (first, length), step = runs[0], runs[1][0] - runs[0][0]
    return all(run == (first + i * step, length) for i, run in enumerate(runs))


def _view_blocks(tensor: Tensor, dim: int, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """View regular runs of one dimension as two dimensions: (runs, length of a run)."""
    start, length = runs[0]
    inside = tensor.narrow(dim, start, runs[-1][0] + length - start)
    return inside.unfold(dim, length, runs[1][0] - start).movedim(-1, dim + 1)


def _list_indexes(runs: tuple[tuple[int, int], ...]) -> Tensor:
    """Return the channels of all runs, one after the other."""
    return torch.tensor([i for start, length in runs for i in range(start, start + length)])


def copy_slice(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return a slice with memory of its own; the slice of a parameter is a parameter."""
    slice_ = _copy_detached(tensor, axes)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(slice_, requires_grad=tensor.requires_grad)
    return slice_


def clone_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of tensors: of those on a GPU many at once, since every kernel that is launched takes its time."""
    copies: list[Tensor | None] = [None] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(() if _is_transformed() else tensors):
        if tensor.is_cuda and tensor.dtype in _NUMBERS and tensor.layout is torch.strided:
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indexes in groups.values():
        # a product with one is exact, also of -0 and NaN
        for index, product in zip(indexes, torch._foreach_mul([tensors[i] for i in indexes], 1), strict=True):
            copies[index] = product
    return [tensor.clone() if copy is None else copy for tensor, copy in zip(tensors, copies, strict=True)]


def slice_for_call(tensors: Iterable[tuple[Tensor, tuple[Axis, ...]]]) -> dict[int, Tensor]:
    """Return the slices for one call of a model, by the ids of the tensors that they are of.

    Slices of whatever requires a gradient lead it back; slices of buffers are copies.
    """
    slices: dict[int, Tensor] = {}
    vectors: dict[int, Tensor] = {}  # views of running statistics and the like, to be copied
    trained: dict[int, tuple[Tensor, tuple[Axis, ...]]] = {}
    gradients, transformed = torch.is_grad_enabled(), _is_transformed()
    for tensor, axes in tensors:
        key, requires_grad = id(tensor), tensor.requires_grad
        if key in slices or key in trained or key in vectors:
            continue
        if not requires_grad and not isinstance(tensor, nn.Parameter):
            if len(axes) == 1 and axes[0] is not None and len(axes[0]) == 1:
                vectors[key] = tensor.narrow(0, *axes[0][0])
            else:
                slices[key] = _copy_detached(tensor, axes)
        elif gradients and requires_grad and any(axes):
            if not transformed and isinstance(tensor, nn.Parameter):
                trained[key] = tensor, axes
            else:  # computed from parameters: by functional_call, DataParallel, or a transform of torch.func
                slices[key] = take_slice(tensor, axes)
        else:
            slices[key] = slice_ = take_slice(tensor, axes)
            if slice_.requires_grad != requires_grad:
                # Without gradients too: torch's matmul picks its kernel by this flag of the weight.
                slice_.requires_grad_(requires_grad)
    slices.update(zip(vectors, clone_tensors(list(vectors.values())), strict=True))
    for ids in _split_into_nodes(trained):
        parameters, axes_of_all = zip(*(trained[key] for key in ids), strict=True)
        slices.update(zip(ids, _Slice.apply(axes_of_all, *parameters), strict=True))
    return slices


def _is_transformed() -> bool:
    """Return whether a transform of torch.func, such as `grad` or `vmap`, is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _copy_detached(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return a slice without gradient that shares no memory with the tensor."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    slice_ = take_slice(tensor, axes)
    if tensor.is_contiguous():  # its addresses are quicker to compare than its storage
        first = tensor.data_ptr()
        shared = first <= slice_.data_ptr() < first + max(1, tensor.nbytes)
    else:
        shared = slice_.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return slice_.clone() if shared else slice_


def _split_into_nodes(trained: Mapping[int, tuple[Tensor, tuple[Axis, ...]]]) -> Iterator[list[int]]:
    """Yield the ids of the parameters, in their order, that share one node of autograd's graph."""
    ids: list[int] = []
    numbers = 0
    for key, (tensor, _) in trained.items():
        numbers += tensor.numel()
        most, limit = (CUDA_NODE_TENSORS, CUDA_NODE_NUMBERS) if tensor.is_cuda else (NODE_TENSORS, NODE_NUMBERS)
        if ids and (len(ids) == most or numbers > limit):
            yield ids
            ids, numbers = [], tensor.numel()
        ids.append(key)
    if ids:
        yield ids


class _Slice(torch.autograd.Function):
    """`take_slice` of a few parameters; its backward adds to the sliced entries of their `.grad` and to no other.

    Autograd's own backward of a slice would fill a gradient of the full parameter with zeros, and add all of it. That
    way is still taken where the gradient is not simply added to `.grad`: in `autograd.grad`, for a gradient of the
    gradient, or if the parameter has a hook.
    """

    @staticmethod
    def forward(ctx: Any, axes: tuple[tuple[Axis, ...], ...], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.axes, ctx.parameters = axes, parameters
        return tuple(map(take_slice, parameters, axes))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None] * (1 + len(gradients))
        blocks: list[Tensor] = []  # of `.grad`, and what is added to them
        parts: list[Tensor] = []
        twice = torch.is_grad_enabled()  # somebody wants the gradient of the gradient
        for i, (gradient, parameter, axes, (node, _)) in enumerate(
            zip(gradients, ctx.parameters, ctx.axes, ctx.next_functions, strict=True), 1
        ):
            if gradient is None:  # the forward did not use this slice
                continue
            if twice or not _accumulates(parameter, node):
                results[i] = _Pad.apply(gradient, parameter, axes)
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            block = _view_block(parameter.grad, axes)
            if block is None:
                add_slice(parameter.grad, gradient, axes)
            else:
                blocks.append(block)
                parts.append(gradient)
        _add_to_blocks(blocks, parts)
        return tuple(results)


class _Pad(torch.autograd.Function):
    """The gradient of a full parameter from that of its slice: zero outside of the slice."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, parameter: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        ctx.axes = axes
        padded = torch.zeros_like(parameter, dtype=gradient.dtype)
        add_slice(padded, gradient, axes)
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return take_slice(gradient, ctx.axes), None, None


def _accumulates(parameter: Tensor, node: Any) -> bool:
    """Return whether the backward that runs now adds to `parameter.grad`, with no hook that reads the gradient."""
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # raised inside torch.autograd.grad()
        return False
