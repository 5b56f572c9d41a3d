"""Movement operators do to the labels what they do to the data."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from timm_autoslim.tracing.flow import Flow, Labels
from timm_autoslim.tracing.labels import Label, Vector
from timm_autoslim.tracing.ops.contraction import tie_rows
from timm_autoslim.tracing.ops.table import rule, tensors_in, unknown
from timm_autoslim.tracing.sizes import Size

_LONG = 1 << 20  # labels of more entries are dropped where their channels stay anyway, to save memory


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
        labelled = [i for i in labelled if not flow.stays(labels[i])] or labelled[-1:]  # type: ignore[arg-type]
    if not labelled:
        return None
    # only one of them can shrink: heads if they are to go, else what has more channels
    i = labelled[0] if flow.loses_heads() else max(labelled, key=lambda j: (sizes[j], j))
    for other in labelled:
        if other != i:
            flow.freeze(labels[other], f"{flow.call.name} merges it with another channel dimension")
    label = labels[i]
    assert label is not None
    if prod(sizes) > _LONG and flow.stays(label):
        return None
    return np.tile(np.repeat(label, prod(sizes[i + 1 :])), prod(sizes[:i]))


def _view(flow: Flow, x: Tensor, out: Tensor, given: Sequence[int] | None) -> None:
    source, target, labels = list(x.shape), list(out.shape), flow.labels(x)
    result: Labels = [None] * len(target)
    if x.numel() == 0:
        flow.freeze_all(labels, f"{flow.call.name} of an empty tensor")
        flow.set_labels(out, result)
        return
    for ins, outs in _regroup(source, target):
        if given is not None and len(target) == 4 and len(outs) > 1 and all(isinstance(given[j], Size) for j in outs):
            kernel = _kernel(flow, [source[i] for i in ins], [labels[i] for i in ins], [target[j] for j in outs])
            if kernel is not None:
                for j, label in zip(outs, kernel, strict=True):
                    result[j] = label
                continue
        ins, outs = [i for i in ins if source[i] != 1], [j for j in outs if target[j] != 1]
        flat = _merge(flow, [source[i] for i in ins], [labels[i] for i in ins])
        if flat is None or not outs:
            continue
        if len(outs) == 1:
            result[outs[0]] = flat
        else:
            sizes = [target[j] for j in outs]
            for j, label in zip(outs, flow.split(flat, sizes, given and [given[j] for j in outs]), strict=True):
                result[j] = label
    if given is not None:
        for label, size, length in zip(result, given, target, strict=True):
            if length != 1:
                flow.constrain(label, size)
    flow.set_labels(out, result)


def _unflattened(flow: Flow, x: Tensor, dim: Any, sizes: Sequence[int], **_: Any) -> Sequence[int] | None:
    """Return the sizes that `unflatten` asks for: those of one dimension are written in the model's code."""
    if not isinstance(dim, int):  # a named dimension
        return None
    shape = flow.sizes(x)
    dim %= x.dim()
    return [*shape[:dim], *sizes, *shape[dim + 1 :]]


def _kernel(flow: Flow, source: Sequence[int], labels: Labels, target: Sequence[int]) -> Labels | None:
    """Label a kernel (N * O, I, kh, kw) that is mixed for each of N images from the rows of a matrix."""
    images = prod(source[:-1])
    if any(v is not None for v in labels[:-1]) or target[0] % images:
        return None
    kernel = flow.kernel(labels[-1], (target[0] // images, *target[1:]))
    if kernel is None:
        return None
    first, *rest = kernel.parts
    return [None if first is None else np.tile(first, images), *rest]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def _view_rule(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    implicit = flow.call.name in ("flatten", "linear", "matmul", "__matmul__", "bmm", "einsum", "baddbmm",
                                  "scaled_dot_product_attention", "group_norm", "layer_norm")  # fmt: skip
    given = None if implicit else flow.written(args[1])
    if flow.call.name in ("view_as", "reshape_as"):
        given = flow.sizes(flow.call.args[1])
    if given is None and not implicit and flow.call.name in ("view", "reshape"):
        given = list(args[1])
    if flow.call.name == "unflatten":
        given = _unflattened(flow, args[0], *flow.call.args[1:], **flow.call.kwargs)
    _view(flow, args[0], out, given)


@rule("permute")
def _permute(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    flow.set_labels(out, [labels[d] for d in args[1]])


@rule("transpose", "t", "numpy_T")
def _transpose(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    if labels:
        a, b = (args[1], args[2]) if len(args) > 2 else (0, -1)
        labels[a], labels[b] = labels[b], labels[a]
    flow.set_labels(out, labels)


@rule("squeeze", "squeeze_", "unsqueeze", "unsqueeze_")
def _squeeze(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = [v for v, n in zip(flow.labels(args[0]), args[0].shape, strict=True) if n != 1]
    if args[0] is out:  # in place: the shape has changed already
        labels = [v for v in flow.labels(args[0]) if v is not None]
    rest = iter(labels)
    flow.set_labels(out, [next(rest) if n != 1 else None for n in out.shape])


_EXPANDS = ("expand", "expand_as", "broadcast_to")


def _like(flow: Flow, out: Tensor, dim: int) -> Label:
    """Label a dimension that torch itself expands: as that of an input of the running function that has this shape."""
    for tensor in tensors_in([*flow.call.args, *flow.call.kwargs.values()]):
        if tensor.shape == out.shape and flow.labels(tensor)[dim] is not None:
            return flow.labels(tensor)[dim]
    return None


@rule("expand")
def _expand(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, given = args[0], flow.written(args[1]) or args[1]
    if flow.call.name == "expand_as":
        given = flow.sizes(flow.call.args[1])
    labels = [None] * (out.dim() - x.dim()) + flow.labels(x)
    old = [1] * (out.dim() - x.dim()) + list(x.shape)
    for d, (before, after) in enumerate(zip(old, out.shape, strict=True)):
        if before == 1 and after != 1:
            labels[d] = flow.sized(after, given[d]) if flow.call.name in _EXPANDS else _like(flow, out, d)
        elif labels[d] is not None and flow.call.name == "expand":
            flow.constrain(labels[d], given[d])
    flow.set_labels(out, labels)


@rule("cat")
def _cat(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensors = [t for t in args[0] if t.numel() or t.dim() > 1]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    labels: Labels = []
    for d in range(out.dim()):
        parts = [flow.labels(t)[d] for t in tensors]
        if d == dim:
            labels.append(_concatenate(flow, parts, [t.shape[d] for t in tensors]))
            continue
        label = parts[0]
        for other in parts[1:]:
            if label is not None or other is not None:
                label = flow.join(label, other, "cat")
        labels.append(label)
    flow.set_labels(out, labels)


def _concatenate(flow: Flow, parts: Labels, sizes: Sequence[int]) -> Label:
    if all(p is None for p in parts):
        return None
    filled = []
    for part, size in zip(parts, sizes, strict=True):
        if part is None:
            part = flow.atoms.fresh(size)
            flow.freeze(part, "cat with a part of fixed length")
        filled.append(part)
    return np.concatenate(filled)


@rule("view_as_complex", "view_as_real")
def _view_as_complex(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])  # of real numbers the last dimension is a pair: real and imaginary
    if flow.operator == "view_as_complex":
        flow.freeze(labels[-1], "view_as_complex takes it for a pair")
    flow.set_labels(out, labels[:-1] if flow.operator == "view_as_complex" else [*labels, None])


@rule("stack")
def _stack(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    labels = flow.broadcast(args[0], args[0][0].shape, "stack")
    flow.set_labels(out, [*labels[:dim], None, *labels[dim:]])


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def _pad(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels, pads = flow.labels(args[0]), args[1]
    for i in range(0, len(pads), 2):
        d = out.dim() - 1 - i // 2
        label = labels[d]
        if label is None or not (pads[i] or pads[i + 1]):
            continue
        if pads[i] < 0 or pads[i + 1] < 0:
            flow.freeze(label, "pad crops it")
            labels[d] = None
            continue
        edges = [flow.atoms.fresh(pads[i]), flow.atoms.fresh(pads[i + 1])]
        flow.freeze_all(edges, "pad adds channels of its own")
        labels[d] = np.concatenate([edges[0], label, edges[1]])
    flow.set_labels(out, labels)


@rule("as_strided", "as_strided_")
def _as_strided(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    if tuple(out.shape) != tuple(args[0].shape):
        return unknown(flow, "as_strided to another shape", args, kwargs, out)
    return flow.set_labels(out, flow.labels(args[0]))


@rule("repeat", "tile")
def _repeat(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, times = args[0], args[1]
    labels = [None] * (out.dim() - x.dim()) + flow.labels(x)
    lengths = [1] * (out.dim() - x.dim()) + list(x.shape)
    given = flow.written(times) or times
    for d, (label, length) in enumerate(zip(labels, lengths, strict=True)):
        if label is not None:
            labels[d] = np.tile(label, times[d])
        elif length == 1 and times[d] > 1:
            labels[d] = flow.sized(times[d], given[d])
    flow.set_labels(out, labels)


@rule("index", "_unsafe_index")
def _index(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, indices = args[0], list(args[1])
    labels = flow.labels(x)
    at = [d for d, index in enumerate(indices) if index is not None]
    for d in at:
        flow.freeze(labels[d], "an index picks channels of it")
    kept = [v for d, v in enumerate(labels) if d not in at]
    together = at == list(range(at[0], at[-1] + 1))
    new: Labels = [None] * (
        out.dim() - len(kept)
    )  # numpy's rule: in place if the indices stand together, else in front
    first = at[0] if together else 0
    flow.set_labels(out, [*kept[:first], *new, *kept[first:]])


@rule("index_select", "embedding", "gather")
def _index_select(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    if flow.operator == "embedding":  # weight (num, C), indices (...)
        labels = flow.labels(args[0])
        flow.freeze(labels[0], "an index picks rows of it")
        return flow.set_labels(out, [*[None] * args[1].dim(), labels[1]])
    labels = flow.labels(args[0])
    flow.freeze(labels[args[1]], "an index picks channels of it")
    labels[args[1]] = None
    same = [v if n == m else None for v, n, m in zip(labels, args[0].shape, out.shape, strict=True)]
    return flow.set_labels(out, same)


@rule("im2col")
def _im2col(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    flow.freeze_all(labels[2:], "unfold runs along it")
    blocks = None if labels[1] is None else np.repeat(labels[1], prod(args[1]))
    flow.set_labels(out, [labels[0], blocks, None])


@rule("col2im")
def _col2im(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    flow.freeze(labels[2], "fold runs along it")
    channels = None
    if labels[1] is not None:
        grid = labels[1].reshape(out.shape[1], prod(args[2]))
        tie_rows(flow, grid)  # the points of one channel's window go together
        channels = grid[:, 0]
    flow.set_labels(out, [labels[0], channels, None, None])


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _pixel_shuffle(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, factor = args[0], args[1]
    labels = flow.labels(x)
    label = labels[1]
    flow.freeze_all(labels[2:], "a pixel shuffle runs along it")
    if label is not None and flow.operator == "pixel_unshuffle":
        label = np.repeat(label, factor * factor)
    elif label is not None and flow.operator == "pixel_shuffle":
        grid = label.reshape(out.shape[1], factor * factor)
        for column in range(1, grid.shape[1]):  # the points of one channel's block go together
            flow.atoms.join(grid[:, 0], grid[:, column])
        label = grid[:, 0]
    elif label is not None:
        label = _shuffled(flow, label, factor)
    flow.set_labels(out, [labels[0], label, *[None] * (out.dim() - 2)])


def _shuffled(flow: Flow, label: Vector, groups: int) -> Label:
    """Read channels (groups, each) by the columns."""
    each, given = len(label) // groups, flow.written_one(groups)
    rows, columns = flow.split(label, [groups, each], [given, -1])
    flow.constrain(rows, given)
    if columns is not None:
        return np.repeat(columns, groups)
    return None if rows is None else np.tile(rows, each)


@rule("glu")
def _glu(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    labels = flow.labels(args[0])
    label = labels[dim]
    if label is not None:
        value, gate = np.split(label, 2)
        flow.atoms.join(value, gate)
        labels[dim] = value
    flow.set_labels(out, labels)


@rule("cumsum", "cumprod", "logcumsumexp")
def _cumulate(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    flow.freeze(labels[args[1]], "a running sum depends on the order of its channels")
    flow.set_labels(out, labels)


@rule("flip")
def _flip(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    for d in args[1]:
        label = labels[d]
        labels[d] = None if label is None else label[::-1]
    flow.set_labels(out, labels)


@rule("roll")
def _roll(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    for d in args[2] if len(args) > 2 else range(len(labels)):
        flow.freeze(labels[d], "roll moves channels by a fixed distance")
    flow.set_labels(out, labels)


def _written_bound(flow: Flow, start: int, end: int) -> tuple[int, int] | None:
    """Find the slice of the running `__getitem__` (or the arguments of `narrow`) that gave these bounds."""
    if flow.call.name == "narrow":
        first, size = flow.written_one(start), flow.written_one(end - start)
        return first, first + size if start else size
    index = flow.call.args[1] if flow.call.name in ("__getitem__", "__setitem__") else None
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice) and not (item.start is None and item.stop is None):
            first, last = item.start or 0, end if item.stop is None else item.stop
            if (first, last) == (start, end):
                return first, last
    return None


@rule("slice")
def _slice(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x = args[0]
    dim, start, end, step = (list(args[1:]) + [0, None, None, 1][len(args) - 1 :])[:4]
    labels = flow.labels(x)
    label, length = labels[dim], x.shape[dim]
    if label is not None and out.shape[dim] != length:
        first, last = start or 0, length if end is None or end > length else end
        labels[dim] = label[first:last:step]
        bounds = _written_bound(flow, first, last) or (first, last)
        if step != 1 and first < step and last == length and length % step == 0:
            tie_rows(flow, label.reshape(-1, step))  # whole blocks stay or go, so the slice takes the same of each
            return flow.set_labels(out, labels)
        if step != 1:
            flow.freeze(label, "a slice with a step takes fixed channels out of it")
        for bound, given in zip((first, last), bounds, strict=True):
            if bound < 0:  # counted from the end
                flow.freeze(label[bound:], "a slice counts channels from its end")
            elif bound and (bound != length or isinstance(given, Size)):
                flow.constrain(label[:bound], given)
    return flow.set_labels(out, labels)


@rule("select")
def _select(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    flow.freeze(labels[args[1]], "an index picks one channel of it")
    del labels[args[1] % len(labels)]
    flow.set_labels(out, labels)


@rule("unbind")
def _unbind(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = (args[1] if len(args) > 1 else 0) % args[0].dim()
    labels = flow.labels(args[0])
    flow.freeze(labels.pop(dim), "unbind takes its channels apart")
    for part in out:
        flow.set_labels(part, labels)


@rule("unfold")
def _unfold(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    flow.freeze(labels[args[1]], "unfold runs along it")
    labels[args[1]] = None
    flow.set_labels(out, [*labels, None])


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    labels = flow.labels(args[0])
    vector = labels[dim]
    if vector is None:
        for part in out:
            flow.set_labels(part, labels)
        return
    ends = np.cumsum([part.shape[dim] for part in out])
    parts = np.split(vector, ends[:-1])
    if flow.call.name not in ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"):
        # chunk, or a function of torch that cuts what it computed, such as a recurrent cell
        if len({len(p) for p in parts}) == 1:
            flow.constraints.tie_counts(parts)
        else:
            flow.freeze(vector, "chunk cuts it into unequal parts")
    else:
        sizes = flow.written([len(p) for p in parts]) or [flow.written_one(args[1])] * len(parts)
        for part, size in zip(parts, sizes, strict=True):
            flow.constrain(part, size)
    for piece, part in zip(out, parts, strict=True):
        labels[dim] = part
        flow.set_labels(piece, labels)
