"""Deep copies of models that hold what `copy.deepcopy` cannot copy."""

from __future__ import annotations

import copy
import functools
import io
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from timm_autoslim.utils.redirecting import redirect_functions
from timm_autoslim.utils.tensors import list_slots

T = TypeVar("T")
# All copies use the same one of these.
_SHARED = (types.ModuleType, io.IOBase, threading.local, type(threading.Lock()), type(threading.RLock()))
_OWN_WAYS = ("__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__")  # a class that has one says how to copy
_MOST_LEVELS = 8


def copy_deeply(model: T, memo: Mapping[int, Any] | None = None) -> T:
    """Return a deep copy of a model.

    Locks, files and Python's modules are shared by all copies. Results of autograd that a module keeps, such as the
    attention biases of a LeViT, are copied without their history. Closures and hooks of the copy refer to its own
    modules. Objects that only look as if they said how they are copied, such as a dict whose `__getattr__` raises a
    KeyError, are copied attribute by attribute.

    Args:
        model: the model.
        memo: by id, what takes the place of an object in the copy.

    Raises:
        Exception: of any type: something else in the model cannot be copied.

    Example:
        >>> import torch
        >>> class Config(dict):
        ...     __getattr__ = dict.__getitem__
        >>> model = torch.nn.Identity()
        >>> model.config = Config(width=4)
        >>> copy_deeply(model).config
        {'width': 4}
    """
    return copy_within(model, dict(memo or {}))


def copy_within(model: T, memo: dict[int, Any]) -> T:
    """Return a deep copy of a model, as a part of a larger deep copy.

    Args:
        model: the model.
        memo: that of `copy.deepcopy`; it gets what was copied.

    Raises:
        Exception: as `copy_deeply`.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for value in module.__dict__.values():  # most are places for hooks, which take `copy.deepcopy` half of its time
            if type(value) is OrderedDict and not value:
                memo.setdefault(id(value), OrderedDict())
    while True:
        memo_of_copy = dict(memo)
        try:
            copied = copy.deepcopy(model, memo_of_copy)
        except Exception:
            obstacle = _find_obstacle(model, memo)
            if obstacle is None:
                raise
            memo[id(obstacle)] = _copy_by_hand(obstacle, memo)
            continue
        if isinstance(copied, nn.Module):
            redirect_functions(copied, memo_of_copy)
        kept = memo_of_copy.pop(id(memo_of_copy), [])  # what has to live as long as its id is in use
        memo.update(memo_of_copy)
        memo.setdefault(id(memo), []).extend(kept)
        return copied


def _find_obstacle(model: Any, memo: Mapping[int, Any]) -> Any:
    """Return what cannot be copied, but by hand; None if there is no such thing."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    objects = {**memo, **{id(module): module for module in modules}}
    for module in modules:
        for name, value in vars(module).items():
            if name != "_modules" and (obstacle := _find_innermost(value, objects, 0)) is not None:
                return obstacle if _is_copied_by_hand(obstacle) else None
    return None


def _find_innermost(value: Any, memo: Mapping[int, Any], depth: int) -> Any:
    """Return the innermost object in a value that cannot be copied; None if it can be."""
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        members = _list_members(value) if depth < _MOST_LEVELS else ()
        inner = (_find_innermost(member, memo, depth + 1) for member in members)
        return next((obstacle for obstacle in inner if obstacle is not None), value)
    return None


def _is_copied_by_hand(value: Any) -> bool:
    kind = type(value)
    if isinstance(value, _SHARED) or (isinstance(value, Tensor) and not value.is_leaf):
        return True
    if issubclass(kind, (nn.Module, Tensor)) or kind.__module__ == "builtins":
        return False
    names = {name for base in kind.__mro__ if base not in (object, dict) for name in vars(base)}
    return not names.intersection(_OWN_WAYS)


def _read_namespace(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, whatever its `__getattr__` does."""
    try:
        return dict(object.__getattribute__(value, "__dict__"))
    except AttributeError:
        return {}


def _read_slots(value: Any) -> dict[str, Any]:
    slots = {}
    for name in list_slots(type(value)):
        try:
            slots[name] = object.__getattribute__(value, name)
        except AttributeError:
            continue
    return {name: member for name, member in slots.items() if name not in ("__dict__", "__weakref__")}


def _list_members(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from dict.values(value)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    if not isinstance(value, type):
        yield from _read_namespace(value).values()
        yield from _read_slots(value).values()


def _copy_by_hand(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an object that has no way of its own to be copied."""
    if isinstance(value, _SHARED):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    kind: Any = type(value)
    copied = memo[id(value)] = kind.__new__(kind)
    if isinstance(value, dict):
        dict.update(copied, {key: copy.deepcopy(member, memo) for key, member in dict.items(value)})
    for name, member in {**_read_namespace(value), **_read_slots(value)}.items():
        object.__setattr__(copied, name, copy.deepcopy(member, memo))
    return copied
