"""Set attributes of modules by their paths, and restore them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

Value = int | float | tuple[int, ...] | list[int]
Change = tuple[dict[Any, Any], Any, Any]  # a dict, a key of it, and the value that was there before


def set_attributes(model: nn.Module, values: Mapping[str, Value]) -> list[Change]:
    """Set `model.<path>` for every path; a path's parts may also be indexes of lists and tuples, and keys of dicts.

    A list or tuple is not changed: a new one takes its place, for others may use the same list, such as a model's
    configuration.

    Returns:
        The changes, for `restore_attributes`.

    Raises:
        KeyError, IndexError: there is nothing at a path; then nothing is changed.
    """
    changes: list[Change] = []
    targets: dict[str, Any] = {"": model}
    try:
        for path, value in values.items():
            parent, _, leaf = path.rpartition(".")
            target, new = _find_target(targets, parent), value
            while isinstance(target, (tuple, list)):
                members: list[Any] = list(target)
                members[int(leaf)] = new
                new = tuple(members) if isinstance(target, tuple) else members
                parent, _, leaf = parent.rpartition(".")
                target = _find_target(targets, parent)
            # not nn.Module.__setattr__, which is slow: an attribute that exists needs no registering
            store = target if isinstance(target, dict) else target.__dict__
            changes.append((store, leaf, store[leaf]))
            store[leaf] = new
    except BaseException:
        restore_attributes(changes)
        raise
    return changes


def restore_attributes(changes: Sequence[Change]) -> None:
    """Undo the changes that `set_attributes` returned, the last one first."""
    for store, key, value in reversed(changes):
        store[key] = value


def _find_target(targets: dict[str, Any], path: str) -> Any:
    """Return the object at a path; `targets` remembers all objects by path but lists and tuples, which are replaced."""
    if path in targets:
        return targets[path]
    parent, _, name = path.rpartition(".")
    target = _get_child(_find_target(targets, parent), name)
    if not isinstance(target, (tuple, list)):
        targets[path] = target
    return target


def _get_child(target: Any, name: str) -> Any:
    if isinstance(target, nn.Module) and name in target._modules:
        return target._modules[name]
    if isinstance(target, (list, tuple)):
        return target[int(name)]
    if isinstance(target, dict):
        return target[name]
    return target.__dict__[name]
