"""One rule for each ATen operator: how labels flow from its inputs to its outputs.

A rule is a function `(flow, args, kwargs, out)` that reads the labels of the inputs and sets those of the output.
Names in the table are those of the operator's overload packet (`aten.add`, without the overload). To teach the
tracer an operator, write such a function here and name the operator in its `@rule` line. An operator without a
rule freezes every channel that enters it and is reported, so an unknown operator can cost reach, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_autoslim.tracing.flow import Flow, Labels
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.sizes import FromAttribute, Size

Rule = Callable[[Flow, tuple[Any, ...], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register one rule for these ATen operators; a name that has a rule already is an error."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"the operator aten.{name} has a rule already: {RULES[name].__name__}")
            RULES[name] = function
        return function

    return register


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (tuple, list)):
        return [t for v in values for t in _tensors(v)]
    return []


def unknown(flow: Flow, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Freeze what enters an operator that has no rule."""
    for tensor in _tensors([*args, *kwargs.values()]):
        flow.freeze_all(flow.labels(tensor), f"the operator aten.{name} has no rule")
    for tensor in _tensors(out):
        flow.set_labels(tensor, [None] * tensor.dim())


# -- elementwise ------------------------------------------------------------------------------------------------

_POINTWISE = """
    add sub rsub mul div pow maximum minimum eq ne lt le gt ge where logical_and logical_or logical_not bitwise_not
    bitwise_and bitwise_or neg abs exp expm1 log log1p log2 sqrt rsqrt reciprocal sigmoid tanh relu relu6 gelu silu mish
    hardswish hardsigmoid hardtanh leaky_relu elu celu selu softplus threshold clamp clamp_min clamp_max clip sin cos
    erf floor ceil round sign square floor_divide remainder fmod nan_to_num log_sigmoid_forward atan2 _prelu_kernel
    softshrink hardshrink isnan isinf sgn addcmul addcdiv lerp
"""


def _pointwise(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensors = _tensors([*args, *kwargs.values()])
    for result in _tensors(out):
        flow.set_labels(result, flow.broadcast(tensors, result.shape, flow.call.name or "an elementwise operator"))


def _pointwise_(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    target, others = args[0], _tensors([*args[1:], *kwargs.values()])
    before = flow.labels(target)
    after = flow.broadcast([target, *others], target.shape, flow.call.name or "an elementwise operator")
    flow.set_labels(target, [b if b is not None else a for b, a in zip(before, after, strict=True)])


for _name in _POINTWISE.split():
    rule(_name)(_pointwise)
    rule(_name + "_")(_pointwise_)
rule("copy_", "masked_fill_", "bernoulli_", "uniform_", "normal_", "random_", "exponential_", "fill_", "zero_")(_pointwise_)
rule("masked_fill", "native_dropout", "bernoulli")(_pointwise)


@rule(
    "clone", "detach", "alias", "_to_copy", "contiguous", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "_softmax", "_safe_softmax", "_log_softmax", "cumsum", "lift_fresh", "lift_fresh_copy",
)  # fmt: skip
def _same(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    flow.set_labels(out, flow.labels(args[0]))


# -- factories --------------------------------------------------------------------------------------------------


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full")
def _factory(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    given = flow.written(out.shape) or list(out.shape)
    flow.set_labels(out, [flow.sized(s, g) for s, g in zip(out.shape, given, strict=True)])


@rule("arange", "scalar_tensor", "linspace", "eye", "tril_indices", "triu_indices", "randperm", "_local_scalar_dense",
      "empty_strided", "new_empty_strided")  # fmt: skip
def _constant(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    for tensor in _tensors(out):
        flow.set_labels(tensor, [None] * tensor.dim())


# -- movement ---------------------------------------------------------------------------------------------------


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
    if not labelled:
        return None
    if len(labelled) > 1:
        for i in labelled:
            flow.freeze(labels[i], f"{flow.call.name} merges it with another channel dimension")
    i = labelled[-1]
    label = labels[i]
    assert label is not None
    return np.tile(np.repeat(label, prod(sizes[i + 1 :])), prod(sizes[:i]))


def _view(flow: Flow, x: Tensor, out: Tensor, given: Sequence[int] | None) -> None:
    source, target, labels = list(x.shape), list(out.shape), flow.labels(x)
    result: Labels = [None] * len(target)
    if x.numel() == 0:
        flow.freeze_all(labels, f"{flow.call.name} of an empty tensor")
        flow.set_labels(out, result)
        return
    for ins, outs in _regroup(source, target):
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


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def _view_rule(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    implicit = flow.call.name in ("flatten", "unflatten", "linear", "matmul", "__matmul__", "bmm", "einsum", "baddbmm",
                                  "scaled_dot_product_attention", "group_norm", "layer_norm")  # fmt: skip
    given = None if implicit else flow.written(args[1])
    if flow.call.name in ("view_as", "reshape_as"):
        given = flow.sizes(flow.call.args[1])
    if given is None and not implicit and flow.call.name in ("view", "reshape"):
        given = list(args[1])
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


@rule("expand")
def _expand(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, given = args[0], flow.written(args[1]) or args[1]
    if flow.call.name == "expand_as":
        given = flow.sizes(flow.call.args[1])
    labels = [None] * (out.dim() - x.dim()) + flow.labels(x)
    old = [1] * (out.dim() - x.dim()) + list(x.shape)
    for d, (before, after) in enumerate(zip(old, out.shape, strict=True)):
        if before == 1 and after != 1:
            labels[d] = flow.sized(after, given[d])
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


# -- parts ------------------------------------------------------------------------------------------------------


def _written_bound(flow: Flow, start: int, end: int) -> tuple[int, int] | None:
    """Find the slice of the running `__getitem__` (or the arguments of `narrow`) that gave these bounds."""
    if flow.call.name == "narrow":
        size = flow.written_one(end - start)
        return (start, size) if start == 0 else None
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
        first = start or 0
        last = length if end is None or end > length else end
        labels[dim] = label[first:last:step]
        bounds = _written_bound(flow, first, last)
        whole = first >= 0 and last >= 0 and step == 1 and bounds is not None
        if not whole or bounds is None:
            flow.freeze(label, "a slice takes fixed channels out of it")
        else:
            if first != 0:
                flow.constrain(label[:first], bounds[0])
            if last != length:
                flow.constrain(label[:last], bounds[1])
    flow.set_labels(out, labels)


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
    if flow.call.name in ("chunk", "tensor_split"):
        if len({len(p) for p in parts}) == 1:
            flow.constraints.tie_counts(parts)
        else:
            flow.freeze(vector, "chunk cuts it into unequal parts")
    else:
        sizes = flow.written([len(p) for p in parts]) or [flow.written_one(args[1])] * len(parts)  # type: ignore[list-item]
        for part, size in zip(parts, sizes, strict=True):
            flow.constrain(part, size)
    for piece, part in zip(out, parts, strict=True):
        labels[dim] = part
        flow.set_labels(piece, labels)


# -- contraction ------------------------------------------------------------------------------------------------


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "dot")
def _matmul(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    *bias, a, b = [t for t in args if isinstance(t, Tensor)]
    la, lb = flow.labels(a), flow.labels(b)
    rows, inner = la[-2:-1], la[-1]
    other = lb[-2] if b.dim() > 1 else lb[-1]
    columns = lb[-1:] if b.dim() > 1 else []
    if inner is not None or other is not None:
        inner = flow.join(inner, other, "a matrix product")
    batch: Labels = []
    if a.dim() == 3:
        batch = [flow.join(la[0], lb[0], "a batched product") if la[0] is not None or lb[0] is not None else None]
    labels = [*batch, *rows, *columns]
    flow.set_labels(out, labels)
    if bias:
        flow.set_labels(out, flow.broadcast([out, bias[0]], out.shape, "a bias"))
    flow.contract(1, [*zip(out.shape, labels, strict=True), (a.shape[-1], inner)])
    if isinstance(b, Tensor) and flow.call.name in ("linear",) and columns:
        flow.produce(columns[0])


@rule("convolution")
def _convolution(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    lx, lw = flow.labels(x), flow.labels(weight)
    for label in lw[2:]:
        flow.freeze(label, "the size of the kernel")
    for label in lx[2:]:
        flow.freeze(label, "a convolution runs along it")
    if groups == 1:
        w_in, w_out = (lw[0], lw[1]) if transposed else (lw[1], lw[0])
        if lx[1] is not None or w_in is not None:
            flow.join(lx[1], w_in, "a convolution")
        out_label = w_out
    else:
        out_label = _grouped(flow, x, weight, lx[1], lw, groups, transposed)
    flow.set_labels(out, [lx[0], out_label, *[None] * (out.dim() - 2)])
    if bias is not None and out_label is not None:
        flow.join(out_label, flow.labels(bias)[0], "the bias of a convolution")
    positions = (x if transposed else out).shape
    flow.contract(positions[0] * prod(positions[2:]), list(zip(weight.shape, lw[:2] + [None] * (weight.dim() - 2), strict=True)))
    flow.produce(out_label)


def _grouped(
    flow: Flow, x: Tensor, weight: Tensor, lx: Label, lw: Labels, groups: int, transposed: bool
) -> Label:
    """Shrink a grouped convolution by whole groups, or by the same share of every group, whichever leaves more steps."""
    given = flow.call.kwargs.get("groups", next((a for a in flow.call.args[6:9] if isinstance(a, Size)), groups))
    out_each = weight.shape[1] if transposed else weight.shape[0] // groups
    in_each = x.shape[1] // groups
    first = lw[0]
    if lx is None or first is None:
        flow.freeze_all([lx, *lw], "a grouped convolution over channels of fixed number")
        return None if first is None or transposed else first
    bound = isinstance(given, Size) and isinstance(given.origin, FromAttribute)
    grid = lx.reshape(groups, in_each)
    if transposed:  # weight (I, O / groups): axis 0 follows the input, axis 1 repeats for each group
        flow.atoms.join(lx, first)
        flow.freeze_all([lx, lw[1]], "a grouped transposed convolution")
        return np.tile(lw[1], groups) if lw[1] is not None else flow.join(lx, lx, "") if out_each == 1 else None
    rows = first.reshape(groups, out_each)
    if groups >= min(in_each, out_each) and (bound or in_each == 1):
        flow.freeze(lw[1], "the channels of one group; whole groups are removed instead")
        _tie_rows(flow, grid)
        _tie_rows(flow, rows)
        flow.atoms.join(grid[:, 0], rows[:, 0])
        flow.constrain(grid[:, 0], given)
    else:
        if lw[1] is not None:
            for share in grid:
                flow.atoms.join(share, lw[1])
        for share in rows[1:]:
            flow.atoms.join(rows[0], share)
    return first


def _tie_rows(flow: Flow, grid: np.ndarray[Any, Any]) -> None:
    for j in range(1, grid.shape[1]):
        flow.atoms.join(grid[:, 0], grid[:, j])


# -- normalisation, pooling, reduction --------------------------------------------------------------------------


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_native_batch_norm_legit_functional")  # fmt: skip
def _batch_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    for parameter in (p for p in args[1:5] if isinstance(p, Tensor)):
        if labels[1] is not None or flow.labels(parameter)[0] is not None:
            labels[1] = flow.join(labels[1], flow.labels(parameter)[0], "batch norm")
    flow.set_labels(out[0], labels)
    for statistic in out[1:3]:
        flow.set_labels(statistic, [labels[1]] if statistic.numel() else [None])


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, shape, *affine = args[:4]
    labels = flow.labels(x)
    for parameter in (p for p in affine if isinstance(p, Tensor)):
        labels = flow.broadcast([x, parameter], x.shape, "layer norm")
    given = flow.written(shape) or shape
    for label, size in zip(labels[-len(shape) :], given, strict=True):
        flow.constrain(label, size)
    results = _tensors(out)
    flow.set_labels(results[0], labels)
    for statistic in results[1:]:
        keep = labels[: -len(shape)] + [None] * len(shape)
        flow.set_labels(statistic, keep[: statistic.dim()])


@rule("native_group_norm")
def _group_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, groups = args[0], args[6]
    labels = flow.labels(x)
    for parameter in (p for p in args[1:3] if isinstance(p, Tensor)):
        labels[1] = flow.join(labels[1], flow.labels(parameter)[0], "group norm")
    vector = labels[1]
    if vector is not None and groups > 1:
        grid = vector.reshape(groups, -1)
        given = flow.written_one(groups)
        if isinstance(given, Size) and groups >= grid.shape[1]:
            _tie_rows(flow, grid)
            flow.constrain(grid[:, 0], given)
        else:
            for share in grid[1:]:
                flow.atoms.join(grid[0], share)
    flow.set_labels(out[0], labels)
    for statistic in out[1:]:
        flow.set_labels(statistic, [None] * statistic.dim())


@rule(
    "max_pool2d_with_indices", "avg_pool2d", "avg_pool1d", "max_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
    "_adaptive_avg_pool3d", "avg_pool3d", "max_pool3d_with_indices", "adaptive_avg_pool1d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_nearest1d",
    "_upsample_bilinear2d_aa", "upsample_linear1d", "_upsample_nearest_exact2d", "grid_sampler_2d",
)  # fmt: skip
def _spatial(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    keep = args[0].dim() - (1 if "1d" in flow.operator else 3 if "3d" in flow.operator else 2)
    for result in _tensors(out):
        flow.set_labels(result, labels[:keep] + [None] * (result.dim() - keep))
    flow.freeze_all(labels[keep:], "pooling or resizing runs along it")


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "logsumexp",
      "max", "min", "all", "any", "argmax", "argmin", "prod")  # fmt: skip
def _reduce(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, results = args[0], _tensors(out)
    if len([a for a in args if isinstance(a, Tensor)]) > 1:
        return _pointwise(flow, args, kwargs, out)
    position = 2 if flow.operator in ("linalg_vector_norm", "norm") else 1
    dims = args[position] if len(args) > position else kwargs.get("dim")
    if dims is None or dims == []:
        dims = range(x.dim())
    elif isinstance(dims, int):
        dims = [dims]
    gone = {d % x.dim() for d in dims} if x.dim() else set()
    labels = flow.labels(x)
    if flow.operator in ("argmax", "argmin", "max", "min"):
        flow.freeze_all([labels[d] for d in gone], "an index of channels leaves it")
    for result in results:
        if result.dim() == x.dim():
            flow.set_labels(result, [None if d in gone else v for d, v in enumerate(labels)])
        else:
            flow.set_labels(result, [v for d, v in enumerate(labels) if d not in gone])
    return None


def execute(operator: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on meta tensors; batch norm's own meta kernel is a slow decomposition, so its shapes are given here."""
    if operator is not torch.ops.aten.native_batch_norm.default:
        return operator(*args, **kwargs)
    x, training = args[0], args[5]
    for parameter in args[1:5]:
        if parameter is not None and parameter.shape[0] != x.shape[1]:
            raise RuntimeError(f"batch norm over {x.shape[1]} channels has a tensor of length {parameter.shape[0]}")
    statistics = x.new_empty(x.shape[1] if training else 0)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def run(flow: Flow, operator: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Apply the rule of one operator, or freeze what enters it."""
    packet = operator._schema.name.split("::")[1]
    namespace = operator.namespace
    found = RULES.get(packet) if namespace == "aten" else None
    flow.operator = packet
    if found is None:
        unknown(flow, packet if namespace == "aten" else operator._schema.name, args, kwargs, out)
    else:
        found(flow, args, kwargs, out)
