"""Run operators on the meta device, where torch's own kernels are slow or look away.

Some of torch's meta kernels take a millisecond: the results of the commonest operators are made here. And torch does
not see there that the bias of a convolution has the wrong length: here it raises.

Every operator of every run passes through `execute`, so nothing is bound to schemas: torch hands over in `args` what
may stand by position, and the functions below name their parameters as the schemas do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten
_UNARY = {
    aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.relu.default,
    aten._safe_softmax.default, aten._softmax.default, aten.hardswish.default, aten.mul.Scalar, aten.div.Scalar,
}  # fmt: skip
_BINARY = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def execute(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on meta tensors.

    Raises:
        RuntimeError: the shapes do not fit, as torch says it, or as it would say it on a device with data.
    """
    x = args[0] if args and isinstance(args[0], Tensor) else None
    if x is None or not x.is_floating_point() or kwargs.get("dtype") is not None:
        return operator(*args, **kwargs)
    if operator in _UNARY:
        return torch.empty_like(x)
    if operator in _BINARY and _fits(x, args[1]):
        return torch.empty_like(x)
    if operator in _SPECIAL:
        result = _SPECIAL[operator](*args, **kwargs)
        if result is not None:
            return result
    return operator(*args, **kwargs)


def _fits(x: Tensor, other: Any) -> bool:
    """Whether the result of arithmetic with `other` has the shape and type of `x`."""
    if not isinstance(other, Tensor):
        return isinstance(other, (int, float))
    if other.dtype != x.dtype or other.dim() > x.dim():
        return False
    return all(n in (1, m) for n, m in zip(reversed(other.shape), reversed(x.shape), strict=False))


# Each returns the operator's result, or None for torch to run it, and to say what is wrong.


def _convolution(
    input: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (O, C / groups, kh, kw), or transposed (C, O / groups, kh, kw)
    bias: Tensor | None,  # (O,)
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> None:
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and len(bias) != channels:
        raise RuntimeError(f"a convolution to {channels} channels has a bias of length {len(bias)}")


def _batch_norm(
    input: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,), as all that follow
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = input.shape[1]
    for parameter in (weight, bias, running_mean, running_var):
        if parameter is not None and parameter.shape[0] != channels:
            raise RuntimeError(f"batch norm over {channels} channels has a tensor of length {parameter.shape[0]}")
    statistics = input.new_empty(channels if training else 0)
    return torch.empty_like(input), statistics, torch.empty_like(statistics)


def _layer_norm(
    input: Tensor,  # (..., *normalized_shape)
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    outer = input.dim() - len(normalized_shape)
    inner = tuple(input.shape[outer:])
    if tuple(normalized_shape) != inner or any(tuple(t.shape) != inner for t in (weight, bias) if t is not None):
        return None
    statistics = input.new_empty((*input.shape[:outer], *[1] * len(normalized_shape)))
    return torch.empty_like(input, memory_format=torch.contiguous_format), statistics, torch.empty_like(statistics)


def _addmm(self: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> Tensor | None:  # (M,), (N, K), (K, M)
    if mat1.dim() != 2 or mat2.dim() != 2 or mat1.shape[1] != mat2.shape[0]:
        return None
    if self.dim() != 1 or self.shape[0] != mat2.shape[1]:
        return None
    return mat1.new_empty(mat1.shape[0], mat2.shape[1])


def _upsample(
    self: Tensor,  # (N, C, H, W)
    output_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    last = self.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (*self.shape[:2], *output_size),
        dtype=self.dtype,
        device=self.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


_SPECIAL: dict[OpOverload, Any] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.addmm.default: _addmm,
    aten.upsample_bilinear2d.default: _upsample,
}
