"""Views show the same data under other dimensions; the labels follow."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.labelling import Labels
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.ops.schema import OperatorCall, tensors_in_lists
from timm_autoslim.tracing.ops.table import RULES, freeze_inputs
from timm_autoslim.tracing.sizes import Size

_LONG = 1 << 20  # labels of more entries are dropped where their channels stay anyway, to save memory
# Functions of torch that reshape tensors on their own: no size of such a view is written in the model's code.
_RESHAPE_INSIDE = (
    "flatten", "linear", "matmul", "__matmul__", "bmm", "einsum", "baddbmm", "scaled_dot_product_attention",
    "group_norm", "layer_norm",
)  # fmt: skip
_EXPANDS = ("expand", "expand_as", "broadcast_to")


# -- another shape --------------------------------------------------------------------------------------------------


@RULES.add("view", "_unsafe_view", "_reshape_alias", "view_copy")
def _view(flow: Flow, op: OperatorCall) -> None:
    if "size" not in op.arguments:
        return freeze_inputs(flow, op, "view reads the bytes as another type")
    return _reshape_to(flow, op["self"], op.out, op["size"])


@RULES.add("reshape")
def _reshape(flow: Flow, op: OperatorCall) -> None:
    _reshape_to(flow, op["self"], op.out, op["shape"])


def _reshape_to(flow: Flow, x: Tensor, out: Tensor, size: Sequence[int]) -> None:
    """Label a view of this size, with the origins that the sizes have in the model's code."""
    name = flow.call.name
    sizes = None if name in _RESHAPE_INSIDE else flow.call.find_sizes(size)
    if name in ("view_as", "reshape_as"):
        sizes = flow.get_sizes(_find_other(flow))
    elif name == "unflatten":
        sizes = _find_sizes(flow, x, *flow.call.args[1:], **flow.call.kwargs)
    elif sizes is None and name in ("view", "reshape"):
        sizes = list(size)
    _label_view(flow, x, out, sizes)


def _find_other(flow: Flow) -> Tensor:
    """Return the tensor whose shape the running function is given: `x.view_as(other)`."""
    other: Tensor = flow.call.kwargs["other"] if "other" in flow.call.kwargs else flow.call.args[1]
    return other


def _find_sizes(flow: Flow, x: Tensor, dim: Any, sizes: Sequence[int], **_: Any) -> Sequence[int] | None:
    """Return the sizes that `unflatten` asks for: those of one dimension are written in the model's code."""
    if not isinstance(dim, int):  # a named dimension
        return None
    shape = flow.get_sizes(x)
    dim %= x.dim()
    return [*shape[:dim], *sizes, *shape[dim + 1 :]]


def _label_view(flow: Flow, x: Tensor, out: Tensor, sizes: Sequence[int] | None) -> None:
    """Label `out`, a view of `x`; `sizes` are its sizes as the model's code gave them."""
    source, target, labels = list(x.shape), list(out.shape), flow.get_labels(x)
    result: Labels = [None] * len(target)
    if x.numel() == 0:
        flow.freeze_labels(labels, f"{flow.call.name} reshapes an empty tensor")
        flow.set_labels(out, result)
        return
    for ins, outs in _regroup(source, target):
        kernel = _label_kernel(flow, x, out, ins, outs, sizes)
        if kernel is not None:
            for j, label in zip(outs, kernel, strict=True):
                result[j] = label
            continue
        ins, outs = [i for i in ins if source[i] != 1], [j for j in outs if target[j] != 1]
        vector = _merge(flow, [source[i] for i in ins], [labels[i] for i in ins])
        if vector is None or not outs:
            continue
        if len(outs) == 1:
            result[outs[0]] = vector
        else:
            parts = flow.split(vector, [target[j] for j in outs], sizes and [sizes[j] for j in outs])
            for j, label in zip(outs, parts, strict=True):
                result[j] = label
    if sizes is not None:
        for label, size, length in zip(result, sizes, target, strict=True):
            if length != 1:
                flow.constrain(label, size)
    flow.set_labels(out, result)


def _regroup(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of source dimensions with runs of target dimensions that hold the same number of elements."""
    groups = []
    i = j = 0
    while i < len(source) or j < len(target):
        ins, outs, a, b = [], [], 1, 1
        if i < len(source):
            ins, a, i = [i], source[i], i + 1
        if j < len(target):
            outs, b, j = [j], target[j], j + 1
        while a != b:
            if (a < b or j >= len(target)) and i < len(source):
                ins.append(i)
                a, i = a * source[i], i + 1
            else:
                outs.append(j)
                b, j = b * target[j], j + 1
        groups.append((ins, outs))
    return groups


def _merge(flow: Flow, sizes: Sequence[int], labels: Labels) -> Label:
    """Label the dimension that several dimensions are flattened into: a channel fills a block, or repeats."""
    labelled = [i for i, label in enumerate(labels) if label is not None]
    if len(labelled) > 1:  # what stays anyway needs no label
        labelled = [i for i in labelled if not flow.is_frozen(labels[i])] or labelled[-1:]  # type: ignore[arg-type]
    if not labelled:
        return None
    # only one of them can shrink: heads if they are to go, else what has more channels
    i = labelled[0] if flow.find_head_globs() else max(labelled, key=lambda j: (sizes[j], j))
    for other in labelled:
        if other != i:
            flow.freeze_label(
                labels[other],
                f"{flow.call.name} merges these channels with another channel dimension, and only one can shrink",
            )
    label = labels[i]
    assert label is not None
    if prod(sizes) > _LONG and flow.is_frozen(label):
        return None
    return np.tile(np.repeat(label, prod(sizes[i + 1 :])), prod(sizes[:i]))


def _label_kernel(
    flow: Flow, x: Tensor, out: Tensor, ins: Sequence[int], outs: Sequence[int], sizes: Sequence[int] | None
) -> Labels | None:
    """Label a kernel (N * O, I, kh, kw) that is mixed for each of N images from the rows of a matrix, if it is one."""
    if sizes is None or out.dim() != 4 or len(outs) < 2 or not all(isinstance(sizes[j], Size) for j in outs):
        return None
    labels = flow.get_labels(x)
    *rows, last = [labels[i] for i in ins]
    images = prod(x.shape[i] for i in ins[:-1])
    first, *rest = [out.shape[j] for j in outs]
    if any(v is not None for v in rows) or first % images:
        return None
    kernel = flow.lay_out_kernel(last, (first // images, *rest))
    if kernel is None:
        return None
    filters, *others = kernel.parts
    return [None if filters is None else np.tile(filters, images), *others]


# -- the same dimensions, moved, dropped or repeated ----------------------------------------------------------------


@RULES.add("permute")
def _permute(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    flow.set_labels(op.out, [labels[d] for d in op["dims"]])


@RULES.add("transpose", "t", "numpy_T")
def _transpose(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    if labels:
        a, b = op.get("dim0", 0), op.get("dim1", -1)  # t and numpy_T name no dimensions
        labels[a], labels[b] = labels[b], labels[a]
    flow.set_labels(op.out, labels)


@RULES.add("squeeze", "squeeze_", "unsqueeze", "unsqueeze_")
def _squeeze(flow: Flow, op: OperatorCall) -> None:
    x, out = op["self"], op.out
    labels = [v for v, n in zip(flow.get_labels(x), x.shape, strict=True) if n != 1]
    if x is out:  # in place: the shape has changed already
        labels = [v for v in flow.get_labels(x) if v is not None]
    rest = iter(labels)
    flow.set_labels(out, [next(rest) if n != 1 else None for n in out.shape])


@RULES.add("expand")
def _expand(flow: Flow, op: OperatorCall) -> None:
    x, out = op["self"], op.out
    sizes = (
        flow.get_sizes(_find_other(flow))
        if flow.call.name == "expand_as"
        else flow.call.find_sizes(op["size"]) or op["size"]
    )
    labels = [None] * (out.dim() - x.dim()) + flow.get_labels(x)
    lengths = [1] * (out.dim() - x.dim()) + list(x.shape)
    for d, (before, after) in enumerate(zip(lengths, out.shape, strict=True)):
        if before == 1 and after != 1:
            labels[d] = (
                flow.label_new_dimension(after, sizes[d])
                if flow.call.name in _EXPANDS
                else _label_as_input(flow, out, d)
            )
        elif labels[d] is not None and flow.call.name == "expand":
            flow.constrain(labels[d], sizes[d])
    flow.set_labels(out, labels)


def _label_as_input(flow: Flow, out: Tensor, dim: int) -> Label:
    """Label a dimension that torch itself expands: as that of an input of the running function that has this shape."""
    for tensor in tensors_in_lists([*flow.call.args, *flow.call.kwargs.values()]):
        if tensor.shape == out.shape and flow.get_labels(tensor)[dim] is not None:
            return flow.get_labels(tensor)[dim]
    return None


@RULES.add("as_strided", "as_strided_")
def _as_strided(flow: Flow, op: OperatorCall) -> None:
    if tuple(op.out.shape) != tuple(op["self"].shape):
        return freeze_inputs(flow, op, "the operator as_strided to another shape has no rule")
    return flow.set_labels(op.out, flow.get_labels(op["self"]))


@RULES.add("view_as_complex")
def _view_as_complex(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])  # (..., 2): real and imaginary parts
    flow.freeze_label(labels[-1], "view_as_complex reads this dimension as real and imaginary parts")
    flow.set_labels(op.out, labels[:-1])


@RULES.add("view_as_real")
def _view_as_real(flow: Flow, op: OperatorCall) -> None:
    flow.set_labels(op.out, [*flow.get_labels(op["self"]), None])  # (..., 2)
