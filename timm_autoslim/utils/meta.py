"""Meta copies of models, and running them: shapes without data, on torch's meta device."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_autoslim.errors import TraceError, quote_error
from timm_autoslim.utils.tensors import collect_tensors, get_attributes, named_tensors


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a meta copy of `model`: the same modules, with every tensor on the meta device.

    Raises:
        TraceError: an attribute of a module cannot be copied; the text names it.
    """
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        meta: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:
        raise TraceError(
            f"{_find_obstacle(model, memo)}: cannot be copied ({type(error).__name__}: {quote_error(error)}); needed: "
            "a model that copy.deepcopy copies; set the attribute to None, or create it in forward"
        ) from error


def _find_obstacle(model: nn.Module, memo: dict[int, Any]) -> str:
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
    """Run the block with the generators of torch (CPU), numpy and Python at seed 0, and put them back after it.

    A model that skips layers at random then takes the same path in every such block.
    """
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def run_model(model: nn.Module, example: Any) -> Any:
    """Return what the model returns for an example: one input, a tuple of inputs, or a dict of inputs by name."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def make_meta_example(example: Any, batch_size: int) -> Any:
    """Return the example with its tensors on the meta device and with another batch size.

    The first dimension of the first tensor is the batch. Other tensors change with it if their first dimension is as
    long; numbers, flags and other tensors stay as they are.
    """
    images = next((len(t) for t in collect_tensors(example) if t.dim()), 0)
    return _replace_tensors(example, images, batch_size)


def _replace_tensors(value: Any, images: int, batch_size: int) -> Any:
    """Return a copy of a nested value with meta tensors: `batch_size` long where they were `images` long."""
    if isinstance(value, Tensor):
        shape = (batch_size, *value.shape[1:]) if value.dim() and len(value) == images else value.shape
        return torch.empty(shape, dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        members = [_replace_tensors(member, images, batch_size) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    if isinstance(value, Mapping):
        result: Any = copy.copy(value) if isinstance(value, MutableMapping) else {}
        for key, member in value.items():
            result[key] = _replace_tensors(member, images, batch_size)
        return result
    if collect_tensors(value):  # a dataclass, or another object
        result = copy.copy(value)
        for name, member in get_attributes(value).items():
            object.__setattr__(result, name, _replace_tensors(member, images, batch_size))
        return result
    return value
