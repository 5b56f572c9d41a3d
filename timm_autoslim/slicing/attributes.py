"""Set attributes of modules by their paths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Value = int | float | tuple[int, ...] | list[int]


def set_attributes(model: nn.Module, values: Mapping[str, Value], *, copy_objects: bool = False) -> None:
    """Set `model.<path>` for every path; a path may lead through lists, tuples, dicts and objects of a module.

    Where a tensor stands, all of its elements get the value, in a new tensor.

    A list or tuple is not changed: a new one takes its place, for others may use the same list, such as a model's
    configuration. Dicts and objects are changed, and so wherever they are referred to.

    Args:
        model: the model.
        values: the new value by path.
        copy_objects: for a model that shares its objects with another: a copy takes the place of an object, and of what
            is changed in it.

    Raises:
        KeyError, IndexError, ValueError: there is nothing at a path.
    """
    owners: dict[str, dict[str, Any]] = {}  # attributes of the modules met so far, by path
    copies: dict[int, Any] = {}  # of objects such as configurations, by id: all modules of the model share one
    for path, value in values.items():
        prefix, _, leaf = path.rpartition(".")
        if leaf in (owner := owners.get(prefix, {})) and not isinstance(owner[leaf], Tensor):  # most paths, in no time
            owner[leaf] = value
            continue
        module, parts = model, path.split(".")
        while len(parts) > 1 and parts[0] in module._modules:
            module, parts = module._modules[parts[0]], parts[1:]  # type: ignore[assignment]
        # not nn.Module.__setattr__, which is slow: an attribute that exists needs no registering
        attributes = module.__dict__ if parts[0] in module.__dict__ else module._buffers
        try:
            first = attributes[parts[0]]
            shared = copy_objects and len(parts) > 1 and not isinstance(first, (list, tuple, dict))
            if shared and id(first) not in copies:
                first = _share_copy(model, first)
                copies[id(first)] = first
            attributes[parts[0]] = _replace(first, parts[1:], value, copy_objects and not shared, copy_dicts=shared)
        except (KeyError, IndexError, ValueError) as error:
            raise type(error)(f"{path}: the model has no such attribute") from error
        if len(parts) == 1:
            owners[prefix] = attributes


def _share_copy(model: nn.Module, value: object) -> Any:
    """Let all modules of a model that hold this object hold a copy of it; return the copy."""
    changed = copy.copy(value)
    for module in model.modules():
        for name in [name for name, held in module.__dict__.items() if held is value]:
            module.__dict__[name] = changed
    return changed


def _replace(holder: Any, parts: Sequence[str], value: Any, copy_objects: bool, copy_dicts: bool) -> Any:
    """Return what takes the place of `holder`, with another value at the path `parts` in it."""
    if not parts:
        return holder.detach().new_full(holder.shape, value) if isinstance(holder, Tensor) else value
    first, rest = parts[0], parts[1:]
    if isinstance(holder, (list, tuple)):
        items = list(holder)
        items[int(first)] = _replace(items[int(first)], rest, value, copy_objects, copy_dicts)
        return tuple(items) if isinstance(holder, tuple) else items
    is_dict = isinstance(holder, dict)
    copies = copy_dicts if is_dict else copy_objects
    changed = copy.copy(holder) if copies else holder
    store = changed if is_dict else changed.__dict__
    # what an object that is shared refers to is shared as well
    store[first] = _replace(store[first], rest, value, copy_objects, copy_dicts or (copies and not is_dict))
    return changed
