"""Elementwise operators join the labels of their inputs; factories make tensors without channels."""

from __future__ import annotations

from typing import Any

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops.table import rule, tensors_in

_POINTWISE = """
    add sub rsub mul div pow maximum minimum eq ne lt le gt ge where logical_and logical_or logical_not bitwise_not
    bitwise_and bitwise_or neg abs exp expm1 log log1p log2 sqrt rsqrt reciprocal sigmoid tanh relu relu6 gelu silu mish
    hardswish hardsigmoid hardtanh leaky_relu elu celu selu softplus threshold clamp clamp_min clamp_max clip sin cos
    erf floor ceil round sign square floor_divide remainder fmod nan_to_num log_sigmoid_forward atan2 _prelu_kernel
    softshrink hardshrink isnan isinf sgn addcmul addcdiv lerp polar complex
"""


def pointwise(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Join the labels of all inputs under broadcasting."""
    tensors = tensors_in([*args, *kwargs.values()])
    for result in tensors_in(out):
        flow.set_labels(result, flow.broadcast(tensors, result.shape, flow.call.name or "an elementwise operator"))


def _pointwise_(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    target, others = args[0], tensors_in([*args[1:], *kwargs.values()])
    before = flow.labels(target)
    after = flow.broadcast([target, *others], target.shape, flow.call.name or "an elementwise operator")
    flow.set_labels(target, [b if b is not None else a for b, a in zip(before, after, strict=True)])


for _name in _POINTWISE.split():
    rule(_name)(pointwise)
    rule(_name + "_")(_pointwise_)
rule("copy_", "masked_fill_", "bernoulli_", "uniform_", "normal_", "random_", "exponential_", "fill_", "zero_")(
    _pointwise_
)
rule("masked_fill", "native_dropout", "bernoulli")(pointwise)


@rule(
    "clone", "detach", "alias", "_to_copy", "contiguous", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "_softmax", "_safe_softmax", "_log_softmax", "lift_fresh", "lift_fresh_copy",
)  # fmt: skip
def _same(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    flow.set_labels(out, flow.labels(args[0]))


@rule("_weight_norm_interface")
def _weight_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    weight, norms = out
    flow.set_labels(weight, flow.broadcast(args[:2], weight.shape, "weight norm"))
    flow.set_labels(norms, flow.labels(args[1]))


_FACTORIES = (
    *("zeros", "ones", "empty", "full", "rand", "randn"),
    *("new_zeros", "new_ones", "new_empty", "new_full"),
)


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full")
def _factory(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    if flow.call.name not in _FACTORIES:  # torch makes it inside another function, after the shape of an input
        like = next((t for t in tensors_in([*flow.call.args]) if t.dim() == out.dim()), None)
        labels = flow.labels(like) if like is not None else [None] * out.dim()
        sizes = like.shape if like is not None else out.shape
        flow.set_labels(out, [v if n == m else None for v, n, m in zip(labels, sizes, out.shape, strict=True)])
        return
    given = flow.written(out.shape) or list(out.shape)
    flow.set_labels(out, [flow.sized(s, g) for s, g in zip(out.shape, given, strict=True)])


@rule("arange", "scalar_tensor", "linspace", "eye", "tril_indices", "triu_indices", "randperm", "_local_scalar_dense",
      "_assert_async", "empty_strided", "new_empty_strided")  # fmt: skip
def _constant(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    for tensor in tensors_in(out):
        flow.set_labels(tensor, [None] * tensor.dim())
