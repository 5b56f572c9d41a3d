"""Find the tensors of a model, or of a nested value."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def collect_tensors(value: Any) -> list[Tensor]:
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
        parts = list(list_attributes(value).values())
    for part in parts:
        yield from _walk(part, seen)


def list_attributes(value: object) -> dict[str, Any]:
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


def find_tied_names(model: nn.Module) -> dict[str, str]:
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
