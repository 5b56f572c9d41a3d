"""Set attributes of modules by their paths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

Value = int | float | tuple[int, ...] | list[int]


def set_attributes(model: nn.Module, values: Mapping[str, Value]) -> None:
    """Set `model.<path>` for every path; a path may lead through lists, tuples, dicts and objects of a module.

    These are not changed: a copy with the new value takes their place in the module, for others may use the same one,
    such as a configuration.

    Raises:
        KeyError, IndexError: there is nothing at a path.
    """
    for path, value in values.items():
        module, parts = model, path.split(".")
        while len(parts) > 1 and parts[0] in module._modules:
            module, parts = module._modules[parts[0]], parts[1:]  # type: ignore[assignment]
        # not nn.Module.__setattr__, which is slow: an attribute that exists needs no registering
        attributes = module.__dict__
        try:
            attributes[parts[0]] = _replace(attributes[parts[0]], parts[1:], value)
        except (KeyError, IndexError, ValueError) as error:
            raise type(error)(f"{path}: the model has no such attribute") from error


def _replace(holder: Any, parts: Sequence[str], value: Any) -> Any:
    """Return a copy of `holder` with another value at the path `parts` in it."""
    if not parts:
        return value
    first, rest = parts[0], parts[1:]
    if isinstance(holder, (list, tuple)):
        items = list(holder)
        items[int(first)] = _replace(items[int(first)], rest, value)
        return tuple(items) if isinstance(holder, tuple) else items
    changed = copy.copy(holder)
    store = changed if isinstance(holder, dict) else changed.__dict__
    store[first] = _replace(store[first], rest, value)
    return changed
