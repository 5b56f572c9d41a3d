"""Find what the code of a model can read and write outside of the model, by the names in the code."""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import types
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from timm_autoslim.utils.codes import LRU_CACHED
from timm_autoslim.utils.meta import is_generator
from timm_autoslim.utils.tensors import list_leaves

# Packages whose code keeps nothing that depends on one model.
_SKIPPED = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "timm_autoslim"}
MISSING = object()
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
_DICTS = (dict, OrderedDict, defaultdict)
CONTAINERS = (*_DICTS, list, set, deque)
_WRAPPED_DICTS = (UserDict, WeakKeyDictionary, WeakValueDictionary)
_WRITES = frozenset({"setdefault", "update", "append", "appendleft", "extend", "insert", "add"})
_STORES = frozenset({"STORE_GLOBAL", "STORE_ATTR", "STORE_DEREF"})
_LARGE = 1000  # containers of more members are data, and not looked into


@dataclass(eq=False)
class Binding:
    """One name in a namespace (a dict, a class, or the cell of a closure), with its value at the start."""

    holder: Any
    name: str
    value: Any

    def read(self) -> Any:
        """Return the value that stands there now."""
        if isinstance(self.holder, types.CellType):
            return _read_cell(self.holder)
        store = vars(self.holder) if isinstance(self.holder, type) else self.holder
        return store.get(self.name, MISSING)

    def write(self, value: Any) -> None:
        """Put a value there; `MISSING` takes the name away."""
        missing = value is MISSING
        if isinstance(self.holder, types.CellType):
            if missing:
                del self.holder.cell_contents
            else:
                self.holder.cell_contents = value
        elif isinstance(self.holder, type):
            type.__delattr__(self.holder, self.name) if missing else type.__setattr__(self.holder, self.name, value)
        elif missing:
            self.holder.pop(self.name, None)
        else:
            self.holder[self.name] = value

    def restore(self) -> None:
        """Put the value of the start back."""
        if self.read() is not self.value:
            self.write(self.value)


@dataclass(eq=False)
class Container:
    """A container of Python, with its members at the start, and the names that it is reached by."""

    value: Any
    members: Any = field(init=False)
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.members = dict(self.value) if isinstance(self.value, dict) else list(self.value)

    def restore(self) -> None:
        """Put the members of the start back, if there are others now."""
        now = dict(self.value) if isinstance(self.value, dict) else list(self.value)
        if len(now) != len(self.members) or not all(map(_is_same, _entries(now), _entries(self.members))):
            _fill(self.value, self.members)

    def has_other_numbers(self) -> bool:
        """Whether it holds numbers that it did not hold at the start."""
        before = {id(member) for entry in _entries(self.members) for member in entry}
        now = (member for entry in _entries(self.value) for member in entry if id(member) not in before)
        return any(isinstance(member, (int, float)) for member in now)

    def list_members(self) -> list[Any]:
        """Return the members at the start, of a dict the values."""
        return list(self.members.values()) if isinstance(self.members, dict) else list(self.members)

    def replace(self, change: Callable[[Any], Any]) -> None:
        """Put others in place of the members that there are now."""
        if isinstance(self.value, dict):
            _fill(self.value, {key: change(member) for key, member in self.value.items()})
        else:
            _fill(self.value, [change(member) for member in self.value])

    def is_filled(self) -> bool:
        """Whether it has members that follow from sizes, as those of a cache do."""
        return any(map(_follows_sizes, _entries(self.value)))

    def has_size_keys(self) -> bool:
        """Whether it is a dict with keys that hold integers."""
        return isinstance(self.value, dict) and any(_holds(key, int) for key in self.value)

    def empty(self) -> None:
        """Take out the members that follow from sizes."""
        if isinstance(self.value, dict):
            _fill(self.value, {key: v for key, v in self.value.items() if not _follows_sizes((key, v))})
        else:
            _fill(self.value, [member for member in self.value if not _follows_sizes((member,))])


def _entries(container: Any) -> Iterable[tuple[Any, ...]]:
    return container.items() if isinstance(container, dict) else ((member,) for member in container)


def _fill(container: Any, members: Any) -> None:
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(members)


def _is_same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x is y for x, y in zip(a, b, strict=True))


def _follows_sizes(entry: tuple[Any, ...]) -> bool:
    """Whether an entry holds a tensor, or, in a dict, an integer: these are what a cache of tables or shapes holds."""
    return any(_holds(value, (Tensor, int) if len(entry) == 2 else Tensor) for value in entry)


def _holds(value: Any, kinds: Any) -> bool:
    return any(isinstance(leaf, kinds) and not isinstance(leaf, bool) for leaf in list_leaves(value))


def _read_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty yet
        return MISSING


class Walk:
    """Follows the code of classes and functions by the names in it, to all that it can read and write.

    Attributes:
        places: names in namespaces, by holder and name.
        namespaces: classes, and the dicts of objects and functions, each with all names in it.
        containers: by id.
    """

    def __init__(self) -> None:
        self.places: dict[tuple[int, str], Binding] = {}
        self.namespaces: list[tuple[Any, frozenset[str]]] = []
        self.containers: dict[int, Container] = {}
        self._todo: list[tuple[Any, frozenset[str], str]] = []  # a value, the names in the code that uses it, its name
        self._ids: set[int] = set()
        self._names: dict[int, set[str]] = {}  # by id of a namespace, the names that were followed
        self._codes: list[tuple[types.CodeType, frozenset[str]]] = []
        self._keep: list[Any] = []  # so that no id is used twice

    def add(self, value: Any, names: frozenset[str] = frozenset(), name: str = "") -> None:
        """Follow a value later: what it holds, and what its code names."""
        if type(value) not in _PLAIN:
            self._todo.append((value, names, name))

    def add_module(self, module: nn.Module) -> None:
        """Follow the code of a module, and its attributes that are callables, or dicts of callables such as hooks."""
        self.add(type(module))
        for value in vars(module).values():
            if type(value) not in _PLAIN and (callable(value) or type(value) in _DICTS):
                for member in value.values() if isinstance(value, dict) else (value,):
                    if callable(member) and not isinstance(member, nn.Module):
                        self.add(member)

    def run(self) -> None:
        """Follow all values."""
        while self._todo:
            value, names, name = self._todo.pop()
            if isinstance(value, types.ModuleType):
                if not _is_skipped(value.__name__):
                    self._follow_namespace(vars(value), names)
            elif type(value) in CONTAINERS:
                self._follow_container(value, name)
            elif id(value) not in self._ids:
                self._ids.add(id(value))
                self._keep.append(value)
                self._follow(value)

    def list_generators(self) -> list[Any]:
        """Return the generators of random numbers."""
        values = [place.value for place in self.places.values()]
        values += [member for container in self.containers.values() for member in container.list_members()]
        return list({id(value): value for value in values if is_generator(value)}.values())

    def find_written_names(self) -> set[str]:
        """Return the names in all code that writes to a container, except as an object is made."""
        names: set[str] = set()
        for code, names_of_code in self._codes:
            writes = dis.opmap["STORE_SUBSCR"] in code.co_code[::2] or not _WRITES.isdisjoint(names_of_code)
            if writes and code.co_name != "__init__":
                names |= names_of_code
        return names

    def list_caches(self, written_names: Set[str]) -> Iterator[Binding | Container]:
        """Yield what the code fills as it runs: containers that it writes to, and names that it stores tensors in."""
        for container in self.containers.values():
            if not container.names.isdisjoint(written_names) and container.is_filled():
                yield container
        tables = [place for place in self.places.values() if _holds(place.value, Tensor)]
        names = {place.name for place in tables}
        # reading instructions takes long, so only of code that has one of the names
        codes = (code for code, names_of_code in self._codes if not names.isdisjoint(names_of_code))
        instructions = (instruction for code in codes for instruction in dis.get_instructions(code))
        stored = {instruction.argval for instruction in instructions if instruction.opname in _STORES}
        yield from (place for place in tables if place.name in stored)

    def _follow(self, value: Any) -> None:
        if isinstance(value, type):
            if not _is_skipped(value.__module__):
                self._note_all(value, vars(value))
                for base in value.__mro__[1:]:
                    self.add(base)
        elif isinstance(value, types.FunctionType):
            self._follow_function(value)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            self.add(value.__func__)
        elif isinstance(value, property):
            for function in (value.fget, value.fset):
                self.add(function)
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            for member in (value.func, *value.args, *value.keywords.values()):
                self.add(member)
        elif type(value) is LRU_CACHED:
            self.add(value.__wrapped__)
        elif isinstance(value, _WRAPPED_DICTS):
            self.add(vars(value)["data"])
        elif not isinstance(value, (nn.Module, Tensor)) and not _is_skipped(type(value).__module__):
            attributes: dict[str, Any] = {}
            with contextlib.suppress(Exception):  # which an object's own `__getattr__` may raise
                attributes = getattr(value, "__dict__", {})  # of an object that keeps a cache
            self._note_all(attributes, attributes)
            self.add(type(value))

    def _follow_function(self, function: types.FunctionType) -> None:
        if _is_skipped(function.__module__):
            self.add(getattr(function, "__wrapped__", None))  # a decorator of torch or functools around the model's own
            for cell in function.__closure__ or ():
                self.add(_read_cell(cell))
            return
        names = self._read_code(function.__code__)
        self._follow_namespace(function.__globals__, names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._note(cell, name, _read_cell(cell))
        self._note_all(function.__dict__, function.__dict__)
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        defaults = function.__defaults__ or ()
        named = zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
        for name, member in (*named, *(function.__kwdefaults__ or {}).items()):
            self.add(member, name=name)

    def _read_code(self, code: types.CodeType) -> frozenset[str]:
        """Return the global names in the code of a function, and of those inside it."""
        names = frozenset(code.co_names)  # an argument that has the name of a global is not that one
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self._codes.append((code, names.union(code.co_freevars, code.co_cellvars, arguments)))
        inside = [self._read_code(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
        return names.union(*inside)

    def _follow_namespace(self, namespace: dict[str, Any], names: frozenset[str]) -> None:
        """Follow the names of a Python module's namespace that some code names."""
        followed = self._names.setdefault(id(namespace), set())
        for name in names - followed:
            value = namespace.get(name, MISSING)
            self._note(namespace, name, value)
            if isinstance(value, types.ModuleType):
                self.add(value, names)
        followed |= names

    def _note_all(self, holder: Any, namespace: Mapping[str, Any]) -> None:
        self.namespaces.append((holder, frozenset(namespace)))
        for name, value in list(namespace.items()):
            self._note(holder, name, value)

    def _note(self, holder: Any, name: str, value: Any) -> None:
        self.places.setdefault((id(holder), name), Binding(holder, name, value))
        if value is not MISSING and not isinstance(value, types.ModuleType):
            self.add(value, name=name)

    def _follow_container(self, value: Any, name: str) -> None:
        container = self.containers.get(id(value))
        if container is not None and name in container.names:
            return
        if container is None:
            container = self.containers[id(value)] = Container(value)
        container.names.add(name)
        if len(value) <= _LARGE:
            for member in list(value.values()) if isinstance(value, dict) else list(value):
                self.add(member, name=name)


def _is_skipped(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in _SKIPPED
