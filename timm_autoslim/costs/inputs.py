"""Inputs for measurements: placed on a device, with ordinary numbers where there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def place_inputs(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return inputs on the device, floating point tensors in the type; tensors on the meta device get numbers."""
    if isinstance(value, Tensor):
        wanted = dtype if value.is_floating_point() else None
        return make_tensor(value.shape, wanted or value.dtype, device) if value.is_meta else value.to(device, wanted)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(place_inputs(v, device, dtype) for v in value)
    if isinstance(value, Mapping):
        return {key: place_inputs(v, device, dtype) for key, v in value.items()}
    return value


def make_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of ordinary numbers: near 1, so that repeated products become neither denormal nor infinite."""
    if dtype.is_floating_point:
        generator = torch.Generator(device).manual_seed(0)  # a measurement must not move the user's random numbers
        return torch.rand(tuple(shape), device=device, generator=generator).add_(0.5).to(dtype)
    make = torch.ones if dtype == torch.bool else torch.zeros
    return make(tuple(shape), dtype=dtype, device=device)
