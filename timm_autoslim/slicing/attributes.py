"""Set attributes of modules by their paths, in copies of the configurations that modules share with others."""

from __future__ import annotations

import copy
import inspect
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from timm_autoslim.utils.redirecting import PLAIN_DICTS
from timm_autoslim.utils.tensors import list_slots

Value = int | float | tuple[int, ...] | list[int]

MODULE_NAMES = frozenset(nn.Module().__dict__)  # what every module has
_MOST_ITEMS = 100_000  # a longer list is no part of a configuration
_MOST_LEVELS = 16  # of lists, dicts and objects in each other


def set_attributes(model: nn.Module, values: Mapping[str, Value], *, has_own_dicts: bool = False) -> None:
    """Set `model.<path>` for every path; a path may lead through lists, tuples, dicts and objects of a module.

    Where a tensor stands, all of its elements get the value, in a new tensor.

    No list, dict or object changes, for others may use the same one: the user, or another model of one configuration.
    A copy takes its place, wherever modules of the model refer to it.

    Args:
        model: the model.
        values: the new value by path.
        has_own_dicts: the dicts that modules hold are the model's own, and change.

    Raises:
        KeyError, IndexError, ValueError: there is nothing at a path.
    """
    owners: dict[str, dict[str, Any]] = {}  # attributes of the modules met so far, by path
    nested: list[tuple[str, dict[str, Any], list[str], Value]] = []  # what is set in dicts and objects
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
        if len(parts) > 1:
            nested.append((path, attributes, parts, value))
            continue
        _set(path, attributes, parts, value)
        owners[prefix] = attributes
    holders: dict[int, Any] = {}  # the dicts and objects that would change, by id
    for path, attributes, parts, _ in nested:
        holders |= _find_holders(path, attributes, parts, has_own_dicts)
    if holders:
        _copy_holders(model, holders)
    for item in nested:
        _set(*item)


def find_members(value: Any) -> dict[str, Any] | None:
    """Return the `__dict__` of an object that may be a configuration; of a dict, itself; None of anything else."""
    if type(value) is dict:
        return value
    if isinstance(value, nn.Module | Tensor | type) or callable(value):
        return None
    package = type(value).__module__.partition(".")[0]
    members = getattr(value, "__dict__", None) if package not in ("torch", "builtins") else None
    return members if type(members) is dict else None


class _Slots(MutableMapping[str, Any]):
    """The slots of an object as a dict."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        kind = type(owner)  # a property of this name would run code
        static = {name: inspect.getattr_static(kind, name, None) for name in list_slots(kind)}
        slots = [name for name, value in static.items() if isinstance(value, types.MemberDescriptorType)]
        self._names = [name for name in slots if hasattr(owner, name)]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return getattr(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("a slot stays")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def rebuild_tuple(value: tuple[Any, ...], items: Sequence[Any]) -> tuple[Any, ...]:
    """Return a tuple like this one, such as a named one, of other items."""
    return value._make(items) if hasattr(value, "_make") else tuple(items)


def list_stores(value: Any) -> list[Any]:
    """Return the lists and dicts in which a value keeps others; a dict of one's own class may have two."""
    kind = type(value)
    if kind is list:
        return [value]
    members = find_members(value)
    stores: list[Any] = [] if members is None else [members]
    if isinstance(value, dict) and members is not value:
        stores.append(value)
    has_slots = kind.__module__.partition(".")[0] not in ("torch", "builtins") and hasattr(kind, "__slots__")
    if has_slots and not isinstance(value, (tuple, nn.Module, Tensor, type, dict)) and not callable(value):
        stores.append(_Slots(value))
    return stores


def read_member(holder: Any, name: str) -> Any:
    """Return what a dict or a configuration object holds under a name, or None; of anything else None."""
    stores = list_stores(holder) if not isinstance(holder, list) else []
    return next((store[name] for store in stores if name in store), None)


def _set(path: str, attributes: dict[str, Any], parts: Sequence[str], value: Value) -> None:
    """Set what stands under the parts of a path in the attributes of a module."""
    items = find_items(attributes, parts[0])
    try:
        attributes[parts[0]] = _replace(attributes[parts[0]], parts[1:], value)
        if items is not None:
            attributes[items] = tuple(attributes[parts[0]].items())
    except (KeyError, IndexError, ValueError) as error:
        raise type(error)(f"{path}: the model has no such attribute") from error


def find_items(attributes: Mapping[str, Any], name: str) -> str | None:
    """Return the attribute that keeps the items of a dict as a tuple, as layers of einops do; None if there is none."""
    value, items = attributes.get(name), attributes.get(f"_{name}")
    if type(value) is not dict or type(items) is not tuple or not all(isinstance(v, int) for v in value.values()):
        return None
    return f"_{name}" if items and items == tuple(value.items()) else None


def _replace(holder: Any, parts: Sequence[str], value: Any) -> Any:
    """Return what takes the place of `holder`, with another value at the path `parts` in it."""
    if not parts:
        return holder.detach().new_full(holder.shape, value) if isinstance(holder, Tensor) else value
    first, rest = parts[0], parts[1:]
    if isinstance(holder, (list, tuple)):
        items = list(holder)
        items[int(first)] = _replace(items[int(first)], rest, value)
        return rebuild_tuple(holder, items) if isinstance(holder, tuple) else items
    stores = [store for store in list_stores(holder) if first in store]
    if not stores:
        raise KeyError(first)
    changed = _replace(stores[0][first], rest, value)
    for store in stores:  # two for a dict whose items are its attributes too
        store[first] = changed
    return holder


def _find_holders(path: str, attributes: dict[str, Any], parts: Sequence[str], has_own_dicts: bool) -> dict[int, Any]:
    """Return the dicts and objects along a path, which setting a value there would change, by id."""
    holders: dict[int, Any] = {}
    holder, is_own = attributes.get(parts[0]), has_own_dicts
    for part in parts[1:]:
        if isinstance(holder, (list, tuple)):
            index = int(part) if part.isdecimal() else len(holder)
            holder = holder[index] if index < len(holder) else None
            continue
        if not list_stores(holder):
            return {}  # there is nothing at this path: setting it tells so
        is_own = is_own and type(holder) in PLAIN_DICTS  # what is in an object is the object's
        if not is_own:
            holders[id(holder)] = holder
        holder = read_member(holder, part)
    return holders


# ------------------------------------------------------------------------------------------------ copies


def _copy_holders(model: nn.Module, holders: Mapping[int, Any]) -> None:
    """Let copies take the place of dicts and objects wherever modules of a model refer to them.

    What refers to one of them, such as a configuration of several parts, is copied as well.

    Args:
        model: the model.
        holders: the dicts and objects, by id.
    """
    stores = _read_attributes(model.modules())
    containers, parents = _find_containers(stores)
    containers.update(holders)
    changed, waiting = set[int](), list(holders)
    while waiting:
        if (key := waiting.pop()) not in changed:
            changed.add(key)
            waiting += parents[key]
    copies = {key: _copy_once(containers[key]) for key in changed if not isinstance(containers[key], tuple)}

    def renew(value: Any) -> Any:
        if id(value) not in changed:
            return value
        if id(value) not in copies:
            copies[id(value)] = rebuild_tuple(value, list(map(renew, value)))
        return copies[id(value)]

    for key in list(copies):
        for store in list_stores(copies[key]):
            for name, value in list(enumerate(store)) if isinstance(store, list) else list(store.items()):
                if id(value) in changed:
                    store[name] = renew(value)
    for module, attributes in zip(model.modules(), stores, strict=True):
        for name, value in attributes.items():
            if id(value) in changed:
                module.__dict__[name] = renew(value)


def _read_attributes(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    return [{n: v for n, v in m.__dict__.items() if n not in MODULE_NAMES} for m in modules]


def list_containers(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """Return what the attributes of modules lead to: lists, tuples, dicts and objects, by id."""
    return _find_containers(_read_attributes(modules))[0]


def _find_containers(stores: Sequence[dict[str, Any]]) -> tuple[dict[int, Any], dict[int, list[int]]]:
    """Return what the attributes of modules lead to: lists, tuples, dicts and objects, by id.

    Args:
        stores: the attributes of each module.

    Returns:
        These, and by id the ids of those that refer to it.
    """
    containers, parents = dict[int, Any](), defaultdict[int, list[int]](list)
    level = [value for store in stores for value in store.values()]
    for _ in range(_MOST_LEVELS):
        following: list[Any] = []
        for value in level:
            if id(value) in containers:
                continue
            children = [child for child in _list_children(value) if list_stores(child) or isinstance(child, tuple)]
            if children or list_stores(value):
                containers[id(value)] = value
            for child in children:
                parents[id(child)].append(id(value))
            following += children
        level = following
    return containers, parents


def _list_children(value: Any) -> Iterator[Any]:
    """Yield what a value keeps, if it may be a part of a configuration."""
    for store in [value] if isinstance(value, tuple) else list_stores(value):
        if len(store) <= _MOST_ITEMS:
            yield from store.values() if isinstance(store, MutableMapping) else store


def _copy_once(value: Any) -> Any:
    """Return a copy that refers to what `value` refers to."""
    try:
        copied = copy.copy(value)
    except Exception:  # of any kind: a class whose `__getattr__` answers for all names cannot be copied
        copied = value
    if copied is value:  # an object that says it needs no copies; but this one shall change
        kind: Any = type(value)
        copied = kind.__new__(kind)
        for store, other in zip(list_stores(copied), list_stores(value), strict=True):
            store.update(other)
    return copied
