"""Set attributes of modules by their paths, and put them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

Value = int | float | tuple[int, ...] | list[int]


def set_attributes(model: nn.Module, values: Mapping[str, Value]) -> list[tuple[Any, Any, Any]]:
    """Set `model.<path>` for every path; parts may be indexes of lists, tuples and dicts.

    A list or tuple is replaced whole, in what holds it: a list may be that of a configuration.

    Returns:
        What `restore_attributes` takes: the dict that holds each value, its key there, and what was there before.

    Raises:
        KeyError, IndexError: a path leads nowhere; then nothing is changed.
    """
    changed: list[tuple[Any, Any, Any]] = []
    known: dict[str, Any] = {"": model}
    try:
        for path, value in values.items():
            above, _, leaf = path.rpartition(".")
            target, new = _target(known, above), value
            while isinstance(target, (tuple, list)):
                members: list[Any] = list(target)
                members[int(leaf)] = new
                new = tuple(members) if isinstance(target, tuple) else members
                above, _, leaf = above.rpartition(".")
                target = _target(known, above)
            # not nn.Module.__setattr__, which is slow: there is nothing here for it to register
            store = target if isinstance(target, dict) else target.__dict__
            changed.append((store, leaf, store[leaf]))
            store[leaf] = new
    except BaseException:
        restore_attributes(changed)
        raise
    return changed


def restore_attributes(changed: Sequence[tuple[Any, Any, Any]]) -> None:
    """Undo what `set_attributes` did."""
    for store, key, value in reversed(changed):
        store[key] = value


def _target(known: dict[str, Any], path: str) -> Any:
    """Find what a path leads to, through what is known already; lists and tuples change, so none is kept."""
    if path in known:
        return known[path]
    above, _, part = path.rpartition(".")
    found = _child(_target(known, above), part)
    if not isinstance(found, (tuple, list)):
        known[path] = found
    return found


def _child(target: Any, part: str) -> Any:
    if isinstance(target, nn.Module) and part in target._modules:
        return target._modules[part]
    if isinstance(target, (list, tuple)):
        return target[int(part)]
    if isinstance(target, dict):
        return target[part]
    return target.__dict__[part]
