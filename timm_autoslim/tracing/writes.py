"""What the code of a model writes to as it runs: names of attributes, and of containers that it fills."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

from timm_autoslim.tracing.holdings import Attribute
from timm_autoslim.utils.codes import list_names, reach_names

_FILLS = frozenset({"setdefault", "update", "append", "appendleft", "extend", "insert", "add", "__setitem__"})
# They name what they set by a text.
_SETS = frozenset({"setattr", "__setattr__", "__dict__", "vars", "register_buffer"})
_STORES = frozenset({"STORE_ATTR", "STORE_DEREF"})
_STORE_CODES = frozenset(dis.opmap[name] for name in _STORES)
_FILL_CODE = dis.opmap["STORE_SUBSCR"]


@dataclass(frozen=True)
class Writes:
    """What code writes to.

    Attributes:
        attributes: names of attributes, and of variables of closures.
        beginnings: beginnings of further names, which the code puts together.
        containers: names in code that fills containers.
    """

    attributes: frozenset[str] = frozenset()
    beginnings: frozenset[str] = frozenset()
    containers: frozenset[str] = frozenset()

    def sets(self, name: str) -> bool:
        """Whether the code sets an attribute of this name."""
        return name in self.attributes or any(map(name.startswith, self.beginnings))


def find_writes(model: nn.Module, attributes: Iterable[Attribute]) -> Writes:
    """Return what the forward of a model writes to, as far as the names in its code tell.

    Args:
        model: the model.
        attributes: what its modules hold; the code of objects and functions among these may run too.
    """
    functions: dict[str, list[CodeType]] = {}
    start = {"forward"}
    for kind in {type(module) for module in model.modules()}:
        _add_methods(functions, kind)
    for attribute in attributes:
        for value in (attribute.read(), attribute.owner):
            start.update(_add_value(functions, value))
    reached = reach_names(start, functions, lambda name: [n for code in functions[name] for n in list_names(code)])
    names = [_read_code(code) for name in reached for code in functions[name]]
    return Writes(*(frozenset[str]().union(*sets) for sets in zip(*names, strict=True))) if names else Writes()


def find_first_value(owner: Any, name: str) -> tuple[bool, Any]:
    """Return whether a constructor sets an attribute, and to what: a constant of its code, else None."""
    if isinstance(owner, types.FunctionType):
        return True, None
    for base in type(owner).__mro__:
        function = vars(base).get("__init__")
        if isinstance(function, types.FunctionType) and not base.__module__.startswith("torch."):
            values = _list_first_values(function.__code__)
            if name in values or name in function.__code__.co_consts:
                return True, values.get(name)
    return False, None


@lru_cache(4096)
def _list_first_values(code: CodeType) -> dict[str, Any]:
    """Return by name the attributes that a constructor sets, each with the constant that it sets first, else None."""
    values: dict[str, Any] = {}
    constants: list[Any] = []  # what the next attributes get
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_CONST":
            constants = [step.argval]
        elif step.opname == "UNPACK_SEQUENCE" and constants and isinstance(constants[0], tuple):
            constants = list(constants[0])
        elif step.opname == "STORE_ATTR":
            values.setdefault(step.argval, constants.pop(0) if constants else None)
        elif step.opname not in ("LOAD_FAST", "CACHE"):
            constants = []
    return values


def _add_methods(functions: dict[str, list[CodeType]], kind: type) -> list[str]:
    """Add the methods of a class that are not torch's or Python's own; return their names."""
    names = []
    for base in kind.__mro__:
        if base is object or base.__module__.startswith(("torch.", "collections", "builtins")):
            continue
        for name, member in vars(base).items():
            function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
            if isinstance(function, types.FunctionType) and name != "__init__":
                functions.setdefault(name, []).extend(_list_codes(function))
                names.append(name)
    return names


def _add_value(functions: dict[str, list[CodeType]], value: Any) -> list[str]:
    """Add the code of a function or an object that modules hold; return the names under which it runs."""
    if isinstance(value, types.MethodType):
        return [*_add_value(functions, value.__func__), *_add_value(functions, value.__self__)]
    if isinstance(value, functools.partial):
        return _add_value(functions, value.func)
    if isinstance(value, types.FunctionType):
        functions.setdefault(value.__qualname__, []).extend(_list_codes(value))
        return [value.__qualname__]
    is_object = hasattr(value, "__dict__") or hasattr(type(value), "__slots__")
    if isinstance(value, (nn.Module, type)) or not is_object or type(value).__module__.startswith("torch"):
        return []
    return _add_methods(functions, type(value))


def _list_codes(function: types.FunctionType) -> Iterator[CodeType]:
    """Yield the code of a function, and of the functions of its package that it names."""
    todo, codes, package = [function], set[CodeType](), function.__module__.partition(".")[0]
    while todo:
        part = todo.pop()
        if part.__code__ in codes:
            continue
        codes.add(part.__code__)
        yield part.__code__
        names = [part.__globals__.get(name) for name in part.__code__.co_names]
        cells = [cell.cell_contents for cell in part.__closure__ or () if cell != types.CellType()]
        others = [f for f in (*names, *cells) if isinstance(f, types.FunctionType)]
        todo += [f for f in others if f.__module__.partition(".")[0] == package]


@lru_cache(4096)
def _read_code(code: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Return the names of attributes that code sets, beginnings of such names, and names where it fills containers."""
    inside = [_read_code(part) for part in code.co_consts if isinstance(part, CodeType)]
    names, operations = frozenset(code.co_names), frozenset(code.co_code[::2])
    stored, beginnings, filled = set[str](), set[str](), frozenset[str]()
    if not _STORE_CODES.isdisjoint(operations):
        stored = {step.argval for step in dis.get_instructions(code) if step.opname in _STORES}
    texts = {part for part in code.co_consts if isinstance(part, str)}
    if not _SETS.isdisjoint(names):
        stored |= {text for text in texts if text.isidentifier()}
        if dis.opmap["BUILD_STRING"] in operations:
            beginnings = {text for text in texts if text.isidentifier()}
    if _FILL_CODE in operations or not _FILLS.isdisjoint(names):
        filled = names | frozenset((*code.co_freevars, *code.co_cellvars))
    return (
        frozenset(stored).union(*(part[0] for part in inside)),
        frozenset(beginnings).union(*(part[1] for part in inside)),
        filled.union(*(part[2] for part in inside)),
    )
