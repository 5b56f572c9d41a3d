"""Inputs for measurements: placed on a device, with ordinary numbers where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from timm_autoslim.utils.tensors import map_tensors


def place_inputs(inputs: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return inputs on the device, floating point tensors in the type; tensors on the meta device get numbers."""

    def place(tensor: Tensor) -> Tensor:
        type_ = dtype if tensor.is_floating_point() else None
        return make_tensor(tensor.shape, type_ or tensor.dtype, device) if tensor.is_meta else tensor.to(device, type_)

    return map_tensors(place, inputs)


def make_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of ordinary numbers: near 1, so that repeated products become neither denormal nor infinite."""
    if dtype.is_floating_point:
        generator = torch.Generator(device).manual_seed(0)  # a measurement must not move the user's random numbers
        return torch.rand(tuple(shape), device=device, generator=generator).add_(0.5).to(dtype)
    make = torch.ones if dtype == torch.bool else torch.zeros
    return make(tuple(shape), dtype=dtype, device=device)
