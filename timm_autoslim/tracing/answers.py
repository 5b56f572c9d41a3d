"""Answers to what a model's code asks about tensors in a run on the meta device: those of a run with data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

OF_GRADIENTS = ("requires_grad", "is_leaf", "grad_fn")
# By function of torch that asks something about a tensor, the question's name.
QUESTIONS: dict[Any, str] = {
    **{getattr(Tensor, name).__get__: name for name in ("device", "is_cpu", "is_cuda", "is_meta", *OF_GRADIENTS)},
    Tensor.get_device: "get_device",
    Tensor.type: "type",
    Tensor.data_ptr: "data_ptr",
}
_PLACES = ("is_cpu", "is_cuda", "is_meta")


def answer_gradients(question: str, is_weight: bool, is_result: bool) -> Any:
    """Return whether a tensor requires a gradient, is a leaf, or the function that computed it.

    Args:
        question: which of these.
        is_weight: the tensor is a weight that learns.
        is_result: it was computed from weights, with gradients enabled.
    """
    if question == "requires_grad":
        return is_weight or is_result
    if question == "is_leaf":
        return not is_result
    return _make_function() if is_result else None


def _make_function() -> Any:
    """Return the function that computed some tensor."""
    with _disable_current_modes(), torch.enable_grad():
        return torch.ones(1, requires_grad=True).neg().grad_fn


def answer_place(question: str, tensor: Tensor, device: torch.device) -> Any:
    """Return where a tensor is, or its type with that; of one on the meta device, as if it were on `device`."""
    if not tensor.is_meta:
        return getattr(tensor, question) if question in ("device", *_PLACES) else getattr(tensor, question)()
    if question == "device":
        return device
    if question in _PLACES:
        return device.type == question.removeprefix("is_")
    if question == "get_device":
        return -1 if device.type == "cpu" else device.index or 0
    if question == "data_ptr":  # of one memory, if it is
        return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()
    return tensor.type().replace("torch.meta.", "torch." if device.type == "cpu" else f"torch.{device.type}.")
