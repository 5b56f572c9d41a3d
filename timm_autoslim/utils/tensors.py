"""The tensors of a model, or of any nested value: find them, or put others in their places."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn


def collect_tensors(value: Any) -> list[Tensor]:
    """Return every tensor in nested tuples, lists, dicts, dataclasses and other objects, in their order."""
    return [tensor for _, tensor in _walk_tensors(value, (), set())]


def name_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of `collect_tensors` with their names: keys, attributes and indices, such as `logits.0`.

    Example:
        >>> [name for name, _ in name_tensors({"logits": torch.ones(2), "states": [torch.ones(3), torch.ones(4)]})]
        ['logits', 'states.0', 'states.1']
    """
    return [(".".join(map(str, path)), tensor) for path, tensor in _walk_tensors(value, (), set())]


def _walk_tensors(value: Any, path: tuple[Any, ...], ids: set[int]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the tensors of a value; `ids` are those of the objects that were entered, for an object may hold itself."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if value is None or isinstance(value, (str, bytes, int, float, type, nn.Module)) or id(value) in ids:
        return
    ids.add(id(value))
    if isinstance(value, Mapping):
        members = list(value.items())
    elif isinstance(value, (tuple, list, deque)):
        fields = getattr(value, "_fields", range(len(value)))
        members = list(zip(fields, value, strict=True))
    else:
        members = list(get_attributes(value).items())
    for name, member in members:
        yield from _walk_tensors(member, (*path, name), ids)


def list_leaves(value: Any) -> Iterator[Any]:
    """Yield what nested tuples and lists hold, or the value itself if it is none; the members of each of them once.

    Example:
        >>> pair = [1, 2]
        >>> sorted(list_leaves([pair, (pair, 3)]))
        [1, 2, 3]
    """
    waiting, ids = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, (tuple, list)):
            yield value
        elif id(value) not in ids:
            ids.add(id(value))
            waiting += value


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of a nested value with `function(tensor)` at the place of each tensor; all else stays.

    It reaches the tensors that `collect_tensors` returns. Tuples, lists, dicts and objects keep their types; a mapping
    that cannot be written to becomes a dict.
    """
    return _map_tensors(function, value, {})


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any, copies: dict[int, Any]) -> Any:
    """Map a nested value; `copies` are those of the objects that were entered, for an object may hold itself."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list, deque)):
        members = [_map_tensors(function, member, copies) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    if isinstance(value, Mapping):
        result: Any = copy.copy(value) if isinstance(value, MutableMapping) else {}
        for key, member in value.items():
            result[key] = _map_tensors(function, member, copies)
        return result
    if id(value) in copies:
        return copies[id(value)]
    if not collect_tensors(value):
        return value
    copies[id(value)] = result = copy.copy(value)  # a dataclass, or another object
    for name, member in get_attributes(value).items():
        object.__setattr__(result, name, _map_tensors(function, member, copies))
    return result


def get_attributes(value: object) -> dict[str, Any]:
    """Return an object's attributes by name: those in its `__dict__`, and those in slots."""
    slots = {name: getattr(value, name) for name in list_slots(type(value)) if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


def list_slots(kind: type) -> list[str]:
    """Return the names of the slots of a class, and of its bases."""
    slots = [getattr(base, "__slots__", ()) for base in kind.__mro__]
    return [name for entry in slots for name in ([entry] if isinstance(entry, str) else entry)]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter, every buffer and every attribute that is a tensor, by name.

    A tied tensor appears once, under the first of its names.
    """
    tensors: dict[str, Tensor] = {}
    ids: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in _module_tensors(path, module):
            if id(tensor) not in ids:
                ids.add(id(tensor))
                tensors[name] = tensor
    return tensors


def find_tied_names(model: nn.Module) -> dict[str, str]:
    """Return, for each further name of a tied tensor, the name that it has in `named_tensors`."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in _module_tensors(path, module):
            if first.setdefault(id(tensor), name) != name:
                ties[name] = first[id(tensor)]
    return ties


def _module_tensors(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one module, without those of its children, each with its name in the model."""
    for store in (module._parameters, module._buffers, module.__dict__):
        for leaf, value in store.items():
            if isinstance(value, Tensor):
                yield f"{path}.{leaf}" if path else leaf, value
