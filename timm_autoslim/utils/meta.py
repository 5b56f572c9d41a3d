"""A copy of a model without data, and examples to run it on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.errors import TraceError, quote_error
from timm_autoslim.utils.tensors import collect_tensors, list_attributes, named_tensors


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without data: every tensor is on the meta device. `model` is not touched.

    Raises:
        TraceError: an attribute of a module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        hollow: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:
        raise TraceError(
            f"{_uncopied(model, memo)}: cannot be copied ({type(error).__name__}: {quote_error(error)}); needed: a "
            "model that copy.deepcopy copies; set the attribute to None, or make it anew in forward"
        ) from error


def _uncopied(model: nn.Module, memo: dict[int, Any]) -> str:
    """Return the path of the attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, {**memo, **{id(m): m for m in model.modules()}})
            except Exception:
                return f"{path}.{name}" if path else name
    return "the model"


@contextlib.contextmanager
def fix_seed() -> Iterator[None]:
    """Let chance be the same in every block, so that a model that drops layers takes one path; restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def run_model(model: nn.Module, example: Any) -> Any:
    """Run the model on a tensor, a tuple or a dict of inputs."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def make_meta_example(example: Any, batch: int) -> Any:
    """Return the example on the meta device, with this many images.

    The first dimension of the first tensor is the batch, and so is that of every other tensor that is as long there.
    """
    images = next((len(t) for t in collect_tensors(example) if t.dim()), 0)
    return _sized(example, images, batch)


def _sized(value: Any, images: int, batch: int) -> Any:
    if isinstance(value, Tensor):
        shape = (batch, *value.shape[1:]) if value.dim() and len(value) == images else value.shape
        return torch.empty(shape, dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        parts = [_sized(v, images, batch) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        filled: Any = copy.copy(value) if isinstance(value, MutableMapping) else {}
        for key, part in value.items():
            filled[key] = _sized(part, images, batch)
        return filled
    if collect_tensors(value):  # a dataclass, or another object
        filled = copy.copy(value)
        for name, part in list_attributes(value).items():
            object.__setattr__(filled, name, _sized(part, images, batch))
        return filled
    return value
