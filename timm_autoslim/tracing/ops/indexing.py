"""Slices, splits and indices take parts of a dimension; the labels of the parts go with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.labelling import Labels
from timm_autoslim.tracing.labels import Vector
from timm_autoslim.tracing.ops.schema import OperatorCall
from timm_autoslim.tracing.ops.table import RULES
from timm_autoslim.tracing.origins import Number, strip_origin
from timm_autoslim.tracing.sizes import Size, negate

_TENSOR_SPLITS = ("tensor_split", "hsplit", "vsplit", "dsplit")
_PLACES = ("indices_or_sections", "indices", "sections", "tensor_indices_or_sections")
_SPLITS = ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")


# -- slices and splits ----------------------------------------------------------------------------------------------


@RULES.add("slice")
def _slice(flow: Flow, op: OperatorCall) -> None:
    x, out, dim, step = op["self"], op.out, op["dim"], op["step"]
    labels = flow.get_labels(x)
    label, length = labels[dim], x.shape[dim]
    if label is None or out.shape[dim] == length:
        return flow.set_labels(out, labels)
    first = op["start"] or 0
    last = length if op["end"] is None or op["end"] > length else op["end"]
    labels[dim] = label[first:last:step]
    if step != 1 and first < step and last == length and length % step == 0:
        flow.tie_rows(label.reshape(-1, step))  # whole blocks stay or go, so the slice takes the same of each
        return flow.set_labels(out, labels)
    if step != 1:
        flow.freeze_label(label, "a slice with a step takes channels at fixed positions")
    if flow.call.name in _TENSOR_SPLITS:
        places = _find_places(*flow.call.args, **flow.call.kwargs)
        if isinstance(places, int):
            _tie_parts(flow, label, places)
            return flow.set_labels(out, labels)
        if not isinstance(places, tuple | list):
            flow.freeze_label(label, f"{flow.call.name} cuts where a tensor says")
    bounds_in_code = _find_bounds(flow, first, last) or (first, last)
    for bound, size in zip((first, last), bounds_in_code, strict=True):
        if bound < 0 and isinstance(size, Number):  # counted from the end
            flow.constrain(label[bound:], negate(size))
        elif bound < 0:
            flow.freeze_label(label[bound:], "a slice counts channels from the end")
        elif bound and (bound != length or isinstance(size, Size)):
            flow.constrain(label[:bound], size)
    return flow.set_labels(out, labels)


def _tie_parts(flow: Flow, label: Vector, number: int) -> None:
    """Let the parts that `tensor_split` cuts channels into stay as many and equal."""
    if isinstance(number, Number):
        flow.freeze_label(label, f"{flow.call.name} cuts these channels into a number of parts that they decide")
    elif len(label) % number:
        flow.freeze_label(label, f"{flow.call.name} cuts these channels into {number} unequal parts")
    else:
        flow.constraints.tie_counts(list(label.reshape(number, -1)))


def _find_places(_: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the number of parts, or the places of the cuts, as the model's code gave them to `tensor_split`."""
    return args[0] if args else next((kwargs[name] for name in _PLACES if name in kwargs), None)


def _find_bounds(flow: Flow, first: int, last: int) -> tuple[int, int] | None:
    """Find the slice of the running `__getitem__` (or the arguments of `narrow`) that gave these bounds."""
    if flow.call.name == "narrow":
        start, length = flow.call.find_size(first), flow.call.find_size(last - first)
        return start, start + length if first else length
    if flow.call.name in _TENSOR_SPLITS:
        places = _find_places(*flow.call.args, **flow.call.kwargs)
        places = places if isinstance(places, tuple | list) else ()
        start, end = (next((p for p in places if strip_origin(p) == bound), bound) for bound in (first, last))
        return start, end
    index = flow.call.args[1] if flow.call.name in ("__getitem__", "__setitem__") else None
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice) and not (item.start is None and item.stop is None):
            bounds = item.start or 0, last if item.stop is None else item.stop
            if bounds == (first, last):
                return bounds
    return None


@RULES.add(*_SPLITS)
def _split(flow: Flow, op: OperatorCall) -> None:
    labels, dim = flow.get_labels(op["self"]), op["dim"]
    vector = labels[dim]
    if vector is None:
        for part in op.out:
            flow.set_labels(part, labels)
        return
    ends = np.cumsum([part.shape[dim] for part in op.out])
    parts = np.split(vector, ends[:-1])
    if flow.call.name in _SPLITS:
        for part, size in zip(parts, _find_lengths(flow, op, parts), strict=True):
            flow.constrain(part, size)
    elif len({len(p) for p in parts}) == 1:
        # chunk, or a function of torch that cuts what it computed, such as a recurrent cell
        flow.constraints.tie_counts(parts)
    else:
        flow.freeze_label(vector, "chunk cuts these channels into unequal parts")
    for tensor, part in zip(op.out, parts, strict=True):
        labels[dim] = part
        flow.set_labels(tensor, labels)


def _find_lengths(flow: Flow, op: OperatorCall, parts: list[Vector]) -> list[int]:
    """Return the lengths of the parts as the model's code gave them to `split`: one for each, or one for all."""
    lengths = [len(part) for part in parts]
    lengths_in_code = flow.call.find_sizes(lengths)
    if lengths_in_code is None and "split_size" in op.arguments:
        return [flow.call.find_size(op["split_size"])] * len(parts)
    return list(lengths_in_code or lengths)


@RULES.add("_pack_padded_sequence")
def _pack(flow: Flow, op: OperatorCall) -> None:
    *outer, channels = flow.get_labels(op["input"])  # (N, T, ...) or (T, N, ...) to (steps, ...)
    flow.freeze_labels(outer[:2], "a packed sequence treats this dimension as steps, not channels")
    packed, sizes = op.out
    flow.set_labels(packed, [None, *outer[2:], channels])
    flow.set_labels(sizes, [None])


@RULES.add("unbind")
def _unbind(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    flow.freeze_label(labels.pop(op["dim"]), "unbind makes a tensor of each channel")
    for part in op.out:
        flow.set_labels(part, labels)


@RULES.add("unfold")
def _unfold(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    flow.freeze_label(labels[op["dimension"]], "unfold treats this dimension as positions, not channels")
    labels[op["dimension"]] = None
    flow.set_labels(op.out, [*labels, None])


# -- indices --------------------------------------------------------------------------------------------------------


@RULES.add("select")
def _select(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    flow.freeze_label(labels.pop(op["dim"]), "an index takes one of these channels")
    flow.set_labels(op.out, labels)


@RULES.add("index", "_unsafe_index")
def _index(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    axes = [d for d, index in enumerate(op["indices"]) if index is not None]
    for d in axes:
        flow.freeze_label(labels[d], "an index takes some of these channels")
    rest = [v for d, v in enumerate(labels) if d not in axes]
    new: Labels = [None] * (op.out.dim() - len(rest))
    # numpy's rule: the new dimensions stand in place if the indices stand together, else in front
    together = axes == list(range(axes[0], axes[-1] + 1))
    first = axes[0] if together else 0
    flow.set_labels(op.out, [*rest[:first], *new, *rest[first:]])


@RULES.add("index_select", "gather")
def _index_select(flow: Flow, op: OperatorCall) -> None:
    x, dim = op["self"], op["dim"]
    labels = flow.get_labels(x)
    flow.freeze_label(labels[dim], "an index takes some of these channels")
    labels[dim] = None
    flow.set_labels(op.out, [v if n == m else None for v, n, m in zip(labels, x.shape, op.out.shape, strict=True)])


@RULES.add("embedding")
def _embedding(flow: Flow, op: OperatorCall) -> None:
    rows, columns = flow.get_labels(op["weight"])  # (rows, C)
    flow.freeze_label(rows, "an index takes some rows of this table")
    flow.set_labels(op.out, [*[None] * op["indices"].dim(), columns])  # (..., C)
