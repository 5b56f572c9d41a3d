"""A copy of a model without data, and examples to run it on."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.errors import TraceError


def tensors_in(value: Any) -> list[Tensor]:
    """Return every tensor in nested tuples, lists, dicts, dataclasses and other objects, in their order."""
    return list(_walk(value, set()))


def _walk(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if value is None or isinstance(value, (str, bytes, int, float, type, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))  # an object may hold itself
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (tuple, list, deque)):
        parts = list(value)
    else:
        parts = list(_attributes(value).values())
    for part in parts:
        yield from _walk(part, seen)


def _attributes(value: object) -> dict[str, Any]:
    """Return what an object holds, in its `__dict__` and in slots."""
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = [n for slot in slots for n in ([slot] if isinstance(slot, str) else slot)]
    return {**{n: getattr(value, n) for n in names if hasattr(value, n)}, **getattr(value, "__dict__", {})}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter, buffer and plain tensor attribute by name; a tied tensor appears once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            for leaf, value in store.items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    found[f"{path}.{leaf}" if path else leaf] = value
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return, for every further name of a tied tensor, the name it has in `named_tensors`."""
    first = {id(t): name for name, t in named_tensors(model).items()}
    ties = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers, module.__dict__):
            for leaf, value in store.items():
                name = f"{path}.{leaf}" if path else leaf
                if isinstance(value, Tensor) and first.get(id(value), name) != name:
                    ties[name] = first[id(value)]
    return ties


# -- copies without data --------------------------------------------------------------------------------------------


def meta_twin(model: nn.Module) -> nn.Module:
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
            f"{_uncopied(model, memo)}: cannot be copied ({type(error).__name__}: {first_line(error)}); needed: a "
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


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, cut to 300 characters."""
    return next(iter(str(error).splitlines()), "")[:300]


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Let chance be the same in every block, so that a model that drops layers takes one path; restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def call(model: nn.Module, example: Any) -> Any:
    """Run the model on a tensor, a tuple or a dict of inputs."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def sized(example: Any, batch: int) -> Any:
    """Return the example on the meta device, with this many images.

    The first dimension of the first tensor is the batch, and so is that of every other tensor that is as long there.
    """
    images = next((len(t) for t in tensors_in(example) if t.dim()), 0)
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
    if tensors_in(value):  # a dataclass, or another object
        filled = copy.copy(value)
        for name, part in _attributes(value).items():
            object.__setattr__(filled, name, _sized(part, images, batch))
        return filled
    return value
