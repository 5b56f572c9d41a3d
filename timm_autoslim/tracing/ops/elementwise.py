"""Elementwise operators join the labels of their inputs; factories make tensors without channels."""

from __future__ import annotations

import numpy as np
import torch

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops.schema import OperatorCall, tensors_in_lists
from timm_autoslim.tracing.ops.table import RULES
from timm_autoslim.tracing.sizes import Size

_POINTWISE = """
    add sub rsub mul div pow maximum minimum eq ne lt le gt ge where logical_and logical_or logical_not bitwise_not
    bitwise_and bitwise_or neg abs exp expm1 log log1p log2 sqrt rsqrt reciprocal sigmoid tanh relu relu6 gelu silu mish
    hardswish hardsigmoid hardtanh leaky_relu elu celu selu softplus threshold clamp clamp_min clamp_max clip sin cos
    erf floor ceil round sign square floor_divide remainder fmod nan_to_num log_sigmoid_forward atan2 _prelu_kernel
    softshrink hardshrink isnan isinf sgn addcmul addcdiv lerp polar complex
"""
_IN_PLACE = [f"{name}_" for name in _POINTWISE.split() if hasattr(torch.ops.aten, f"{name}_")]


@RULES.add(*_POINTWISE.split(), "masked_fill", "native_dropout", "bernoulli")
def join_inputs(flow: Flow, op: OperatorCall) -> None:
    """Join the labels of all inputs under broadcasting."""
    for result in tensors_in_lists(op.out):
        labels = flow.broadcast(op.tensors, result.shape, flow.call.name or "an elementwise operator")
        flow.set_labels(result, labels)


@RULES.add(
    *_IN_PLACE,
    *("copy_", "masked_fill_", "bernoulli_", "uniform_", "normal_", "random_", "exponential_", "fill_", "zero_"),
)
def _join_in_place(flow: Flow, op: OperatorCall) -> None:
    target = op["self"]
    before = flow.get_labels(target)
    after = flow.broadcast(op.tensors, target.shape, flow.call.name or "an elementwise operator")
    flow.set_labels(target, [b if b is not None else a for b, a in zip(before, after, strict=True)])


@RULES.add(
    "clone", "detach", "alias", "_to_copy", "contiguous", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "_softmax", "_safe_softmax", "_log_softmax", "lift_fresh", "lift_fresh_copy",
)  # fmt: skip
def _copy_labels(flow: Flow, op: OperatorCall) -> None:
    flow.set_labels(op.out, flow.get_labels(op["self"]))


@RULES.add("glu")
def _glu(flow: Flow, op: OperatorCall) -> None:
    labels, dim = flow.get_labels(op["self"]), op["dim"]
    label = labels[dim]
    if label is not None:
        value, gate = np.split(label, 2)
        flow.atoms.join(value, gate)
        labels[dim] = value
    flow.set_labels(op.out, labels)


@RULES.add("_weight_norm_interface")
def _weight_norm(flow: Flow, op: OperatorCall) -> None:
    v, g = op["v"], op["g"]  # v as long as the weight, g of length 1 in all dimensions but `dim`
    weight, norms = op.out
    flow.set_labels(weight, flow.broadcast([v, g], weight.shape, "weight norm"))
    flow.set_labels(norms, flow.get_labels(g))


_FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full")


@RULES.add(*_FACTORIES)
def _factory(flow: Flow, op: OperatorCall) -> None:
    out = op.out
    if flow.call.name not in _FACTORIES:  # torch makes it inside another function, after the shape of an input
        inputs = tensors_in_lists([*flow.call.args, *flow.call.kwargs.values()])
        like = next((t for t in inputs if t.dim() == out.dim()), None)
        labels = flow.get_labels(like) if like is not None else [None] * out.dim()
        sizes = like.shape if like is not None else out.shape
        flow.set_labels(out, [v if n == m else None for v, n, m in zip(labels, sizes, out.shape, strict=True)])
        return
    sizes_in_code = flow.call.find_sizes(out.shape) or list(out.shape)
    flow.set_labels(out, [flow.label_new_dimension(n, size) for n, size in zip(out.shape, sizes_in_code, strict=True)])


@RULES.add("eye")
def _identity(flow: Flow, op: OperatorCall) -> None:
    """Label an identity matrix: what keeps the same rows and columns of it is one too."""
    sizes = flow.call.list_integers() if flow.call.name == "eye" else []  # rows, or rows and columns
    labels = [flow.label_new_dimension(int(size), size) for size in sizes]
    for label in labels:
        if label is not None:
            flow.forget_new(label)  # not all numbers are equal
    rows, columns = labels * 2 if len(labels) == 1 else labels or [None, None]
    if rows is not None or columns is not None:
        if op.out.shape[0] == op.out.shape[1]:
            rows = columns = flow.join(rows, columns, "eye")
        else:
            flow.freeze_labels([rows, columns], "eye makes as many rows and columns as it is told")
    flow.set_labels(op.out, [rows, columns])


@RULES.add("arange", "linspace")
def _number(flow: Flow, op: OperatorCall) -> None:
    """Freeze what is joined with a table of numbers that the code makes for the channels that it finds."""
    label = None
    if isinstance(flow.call.find_size(len(op.out)), Size):
        label = flow.atoms.create(len(op.out))
        what = f"its code makes a table for the width that it finds (by {op.name})"
        flow.freeze_label(label, f"{what}, and a narrower one is no part of it")
    flow.set_labels(op.out, [label])


@RULES.add(
    "scalar_tensor", "tril_indices", "triu_indices", "randperm", "_local_scalar_dense",
    "_assert_async", "empty_strided", "new_empty_strided",
)  # fmt: skip
def _constant(flow: Flow, op: OperatorCall) -> None:
    for tensor in tensors_in_lists(op.out):
        flow.set_labels(tensor, [None] * tensor.dim())
