"""What modules hold beside weights: tensors and numbers in attributes, buffers, containers, objects and closures."""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timm_autoslim.slicing.slices import is_cache
from timm_autoslim.tracing.origins import Number
from timm_autoslim.utils.tensors import get_attributes

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = frozenset({str, bytes, bool, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType})
_SKIPPED = frozenset(sys.stdlib_module_names) | {"torch", "timm", "numpy", "timm_autoslim", "builtins"}
_LARGE = 1000  # containers of more members are data, and not looked into


@dataclass(frozen=True, eq=False)
class Attribute:
    """An attribute or buffer of a module, or an attribute of an object (a cell of a function) that it holds.

    Attributes:
        path: the module.
        name: the attribute, such as `store.table`.
        owner: the module, object or function.
        store: the dict, object or cell where it stands, under `key`.
    """

    path: str
    name: str
    owner: Any
    store: Any
    key: str

    def read(self) -> Any:
        """Return its value."""
        if isinstance(self.store, dict):
            return self.store[self.key]
        return getattr(self.store, self.key)

    def write(self, value: Any) -> None:
        """Set its value."""
        if isinstance(self.store, dict):
            self.store[self.key] = value
        else:
            object.__setattr__(self.store, self.key, value)

    def remove(self) -> None:
        """Take it away."""
        if isinstance(self.store, dict):
            del self.store[self.key]
        else:
            object.__delattr__(self.store, self.key)


def list_attributes(model: nn.Module) -> Iterator[Attribute]:
    """Yield what the modules of a model hold, but not what every module has, nor the dicts that are known as caches."""
    modules = list(model.named_modules())
    ids = {id(module) for _, module in modules}
    kinds: set[Any] = {type(module) for _, module in modules}
    known = {k: _list_known_names(k) if k.__module__.startswith("torch.nn.") else _OF_EVERY_MODULE for k in kinds}
    for path, module in modules:
        kind, attributes = type(module), vars(module)
        for name in [name for name in attributes if name not in known[kind]]:
            value = attributes[name]
            if type(value) not in _PLAIN and not is_cache(kind, name, value):
                yield Attribute(path, name, module, attributes, name)
                if type(value) not in (int, float) and not isinstance(value, (Tensor, Number)):
                    yield from _list_inner(path, name, value, ids)
        for name, value in module._buffers.items():
            if value is not None and name not in known[kind]:
                yield Attribute(path, name, module, module._buffers, name)


@functools.cache
def _list_known_names(kind: type) -> frozenset[str]:
    """Return the names of the attributes and buffers of one of torch's classes that hold nothing of a run.

    Those are what every module has, and what the constructor names.
    """
    names = _OF_EVERY_MODULE
    for base in kind.__mro__:
        code = getattr(vars(base).get("__init__"), "__code__", None)
        if code is not None:
            names |= frozenset((*code.co_names, *(name for name in code.co_consts if isinstance(name, str))))
    return names


def _list_inner(path: str, name: str, value: Any, ids: set[int]) -> Iterator[Attribute]:
    """Yield the attributes of the objects that a value is, or holds."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, (int, float, Tensor)) or id(value) in ids:
        return
    ids.add(id(value))
    if isinstance(value, (list, tuple, deque, set, Mapping)):
        for member in (value.values() if isinstance(value, Mapping) else value) if len(value) <= _LARGE else ():
            yield from _list_inner(path, name, member, ids)
    elif kind is types.MethodType:
        yield from _list_inner(path, name, value.__self__, ids)
    elif kind is functools.partial:
        for member in (value.func, *value.args, *value.keywords.values()):
            yield from _list_inner(path, name, member, ids)
    else:
        for attribute in _list_of_object(path, name, value):
            yield attribute
            yield from _list_inner(path, attribute.name, attribute.read(), ids)


def _list_of_object(path: str, name: str, value: Any) -> Iterator[Attribute]:
    """Yield the attributes of one object, or the cells and attributes of a function."""
    if isinstance(value, types.FunctionType):
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if cell != types.CellType():
                yield Attribute(path, f"{name}.{key}", value, cell, "cell_contents")
        for key in value.__dict__:
            yield Attribute(path, f"{name}.{key}", value, value.__dict__, key)
    elif isinstance(value, nn.Module):
        for store in (vars(value), value._buffers):
            for key in store.keys() - _OF_EVERY_MODULE:
                yield Attribute(path, f"{name}.{key}", value, store, key)
    elif not isinstance(value, type) and type(value).__module__.partition(".")[0] not in _SKIPPED:
        for key in get_attributes(value):
            yield Attribute(path, f"{name}.{key}", value, value, key)


def list_values(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and numbers in nested containers, each with its place there; those in each container once.

    What stands under a size in a dict is no number that is kept: it is looked up by that size.
    """
    return _list_values(value, place, set())


def _list_values(value: Any, place: str, ids: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Tensor, int, float)):
        if type(value) is not bool:
            yield place, value
        return
    is_mapping = isinstance(value, Mapping)
    if not (is_mapping or isinstance(value, (list, tuple, deque))) or len(value) > _LARGE or id(value) in ids:
        return
    ids.add(id(value))
    for key, member in value.items() if is_mapping else enumerate(value):
        is_table = is_mapping and _holds_number(key)
        for inner, leaf in _list_values(member, f"{place}[{key!r}]", ids):
            if isinstance(leaf, Tensor) or not is_table:
                yield inner, leaf


def _holds_number(key: Any) -> bool:
    return any(map(_holds_number, key)) if isinstance(key, tuple) else isinstance(key, Number)
