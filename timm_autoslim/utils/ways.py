"""The ways from code to objects: what a function can read, by the names in its code and in the code that it names."""

from __future__ import annotations

import contextvars
import gc
import re
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from timm_autoslim.utils.codes import ASIDE, LRU_CACHED, list_globals, list_names, takes_attributes_alone
from timm_autoslim.utils.redirecting import CONSTANTS, STORES, read_cell
from timm_autoslim.utils.tensors import list_slots

# Packages whose code is not read: it knows no attribute of a user's objects.
_SKIPPED = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "timm_autoslim"}
# Where the code of installed packages is: their globals do not hold a user's model.
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
# Kinds of objects from these modules of Python hold others without a name.
_NAMELESS = frozenset({"builtins", "functools", "itertools", "collections", "weakref", "operator"})
# Packages of Python with classes that only hold attributes, or of which no method returns a model.
_WITHOUT_METHODS = frozenset({"types", "argparse", "_thread", "logging"})
_CONTAINERS = (dict, list, tuple, set, frozenset)
# With one of these names, code may read all attributes of an object, or all that a module holds.
EVERY_ATTRIBUTE = {"getattr", "vars", "__dict__", "__getattribute__", "__getattr__", "attrgetter", "eval", "exec"}
_EVERY_PART = EVERY_ATTRIBUTE | {
    "modules", "children", "named_modules", "named_children", "parameters", "named_parameters", "buffers",
    "named_buffers", "state_dict", "get_submodule", "get_parameter", "get_buffer", "apply", *STORES,
}  # fmt: skip
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MOST_OBJECTS = 20_000  # more code than any model has

_OF_ATTRIBUTES = {"__getattr__", "__getattribute__", "__setattr__", "__delattr__"}  # special methods

Way = tuple[Any, str]  # an object, and how it is found, such as "trainer.model"


@dataclass(frozen=True, eq=False)
class _Receiver:
    """An object of which code only takes or sets attributes: Python calls those special methods alone by itself."""

    value: Any


class Walk:
    """Follows code to what it can read: by names through objects and modules, and by every way through containers.

    Attributes:
        ends: by id of an object at which a walk ends, what it is.
        own: ids of modules whose weights are no end; only what their code and attributes lead to may be.
        root: the module that is not called, since the code is a part of it.
        names: those of attributes and globals in the code that the last walk has met.
        met: by id, what the last walk has met.
        is_whole: whether that is all that there was.
    """

    def __init__(
        self, ends: dict[int, str], own: set[int], root: nn.Module, *, installed: bool = False, most: int = sys.maxsize
    ) -> None:
        """Prepare walks.

        Args:
            ends, own, root: see above.
            installed: look into the globals of installed packages too.
            most: so many objects are met.
        """
        self.ends, self.own, self.root, self.installed, self.most = ends, own, root, installed, most
        self.names, self.met, self.is_whole = set[str](), dict[int, Way](), True
        self._members: dict[type, tuple[dict[str, list[Any]], set[str]]] = {}

    def find(self, starts: Iterable[Way], names: Iterable[str] = ()) -> dict[str, str]:
        """Return which ends the code reaches, each with the way to it.

        Args:
            starts: functions, or objects that code uses which mentions `names`.
            names: of attributes.
        """
        starts, before = list(starts), -1
        self.names = mentioned = set(names)
        found: dict[str, str] = {}
        while len(mentioned) > before:  # code that is found late may mention an attribute of what was met early
            before, waiting, met, alive = len(mentioned), list(starts), dict[int, Way](), list[Any]()
            while waiting and len(met) < self.most:
                value, way = waiting.pop()
                if (type(value) in CONSTANTS and type(value) is not type) or id(value) in met:
                    continue
                content = value.value if isinstance(value, _Receiver) else value
                alive.append(value)  # so that no other object gets its id
                met[id(value)] = content, way
                if id(content) in self.ends:
                    found.setdefault(self.ends[id(content)], way)
                else:
                    waiting += self._list_next(value, way, mentioned)
            self.met, self.is_whole = met, not waiting
            if waiting:
                break
        return found

    def _list_next(self, value: Any, way: str, names: set[str]) -> Iterator[Way]:
        """Yield what a value leads to; the names in code are added to `names`."""
        if isinstance(value, _Receiver):
            yield from self._list_of_receiver(value.value, way, names)
        elif type(value) in weakref.ProxyTypes:  # it says that it is what it stands for
            yield _read_proxy(value), way
        elif isinstance(value, types.FunctionType):
            yield from _list_of_function(value, way, names, self.installed)
        elif isinstance(value, types.ModuleType):
            if not is_skipped(value.__name__):
                yield from _pick(vars(value), value.__name__, names)
        elif isinstance(value, type):
            yield from self._list_of_class(value, way or value.__name__, names)
        elif isinstance(value, nn.Module):
            yield from self._list_of_module(value, way or type(value).__name__, names)
        elif isinstance(value, weakref.ref):
            yield value(), way
        elif isinstance(value, np.ndarray):
            yield from ((member, way) for member in (value.flat if value.dtype == object else ()))
        elif isinstance(value, Tensor):
            return
        elif isinstance(value, types.MethodType):
            yield value.__func__, type(value.__self__).__name__
            alone = _takes_attributes_of_self(value.__func__)
            yield _receive(value.__self__) if alone else value.__self__, type(value.__self__).__name__
        elif type(value) is LRU_CACHED:  # its keys are what it was called with, and returned to nobody
            yield value.__wrapped__, way
        elif type(value).__module__ in _NAMELESS:
            yield from _list_members(value, way)
        else:
            way, attributes = way or type(value).__name__, _read_attributes(value)
            yield from _list_members(value, way) if isinstance(value, _CONTAINERS) else ()
            yield from _pick(attributes, way, set(attributes) if _has_methods(type(value)) else names, EVERY_ATTRIBUTE)
            yield from self._list_of_class(type(value), way, names)

    def _list_of_receiver(self, value: Any, way: str, names: set[str]) -> Iterator[Way]:
        way, members = way or type(value).__name__, self._find_members(type(value))[0]
        called = not all(_takes_attributes_of_self(m) for name in members.keys() & names for m in members[name])
        if isinstance(value, nn.Module):
            yield from self._list_of_module(value, way, names, called)
        else:
            yield from _pick(_read_attributes(value), way, names, EVERY_ATTRIBUTE)
            yield from self._list_of_class(type(value), way, names, called)

    def _list_of_module(self, module: nn.Module, way: str, names: set[str], called: bool = True) -> Iterator[Way]:
        namespace, kind, is_own = module.__dict__, type(module), id(module) in self.own
        mentioned = namespace.keys() if not names.isdisjoint(EVERY_ATTRIBUTE) else namespace.keys() & names
        yield from _pick(namespace, way, mentioned - _OF_EVERY_MODULE)
        every = is_skipped(kind.__module__) or "__getattr__" in vars(kind)  # a Sequential is indexed
        for store in STORES if not is_own else ("_modules",):
            yield from _pick(namespace[store], way, set(namespace[store]) if every else names, _EVERY_PART)
        called = called and not is_own and module is not self.root
        yield from self._list_of_class(kind, way, names | {"forward"} if called else names, called or is_own)

    def _list_of_class(self, kind: type, way: str, names: set[str], called: bool = True) -> Iterator[Way]:
        """Yield what a class defines under the names that code mentions, and the methods that Python calls itself."""
        members, implied = self._find_members(kind)
        for name in members.keys() & names | (implied if called else implied & _OF_ATTRIBUTES):
            for value in members[name]:
                yield value, f"{way}.{name}"

    def _find_members(self, kind: type) -> tuple[dict[str, list[Any]], set[str]]:
        if kind not in self._members:
            self._members[kind] = _collect_members(kind)
        return self._members[kind]


def _collect_members(kind: type) -> tuple[dict[str, list[Any]], set[str]]:
    """Return what a class and its bases define, by name, and the names of the methods that Python calls itself."""
    members: dict[str, list[Any]] = {}
    implied: set[str] = set()
    for base in kind.__mro__:
        for name, value in vars(base).items() if not is_skipped(base.__module__) else ():
            members.setdefault(name, []).append(value)
            if name.startswith("__") and name not in ASIDE and isinstance(value, types.FunctionType):
                implied.add(name)
    return members, implied


def is_skipped(module: str | None) -> bool:
    """Whether code of a Python module is not read."""
    return module is None or module.partition(".")[0] in _SKIPPED


def _pick(namespace: dict[str, Any], way: str, names: set[str], every: Iterable[str] = ()) -> Iterator[Way]:
    """Yield what stands under names that code mentions; all of it if the code mentions one of `every`."""
    picked = namespace.keys() if not names.isdisjoint(every) else namespace.keys() & names
    for name in picked:
        yield namespace[name], f"{way}.{name}"


def _list_of_function(function: types.FunctionType, way: str, names: set[str], installed: bool) -> Iterator[Way]:
    code = function.__code__
    if not is_skipped(function.__globals__.get("__name__")):  # a decorator takes the name of what it wraps
        names.update(list_names(code))
        if installed or not _INSTALLED.search(code.co_filename):
            yield from _list_global_ways(code, function.__globals__, set(list_names(code)))
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        content = read_cell(cell)
        alone = takes_attributes_alone(code, name)
        yield _receive(content) if alone else content, way if name == "self" and way else name
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield value, ""
    yield from _pick(function.__dict__, function.__name__, set(function.__dict__))


def _list_global_ways(code: types.CodeType, scope: dict[str, Any], names: set[str]) -> Iterator[Way]:
    """Yield what a function finds by global names, and in Python's modules by the other names in its code."""
    waiting = [(scope[name] if name in scope else sys.modules.get(name), name) for name in list_globals(code)]
    met = set[int]()
    while waiting:
        value, way = waiting.pop()
        if not isinstance(value, types.ModuleType):
            yield value, way
        elif id(value) not in met and not is_skipped(value.__name__):
            met.add(id(value))
            waiting += _pick(vars(value), way, names)


def _takes_attributes_of_self(member: Any) -> bool:
    """Whether a member of a class is no method, or one that only takes or sets attributes of its object."""
    function = member.fget if isinstance(member, property) else member
    if not isinstance(function, types.FunctionType):
        return not hasattr(type(function), "__get__")  # as a class method or what a decorator made has
    code = function.__code__
    return bool(code.co_argcount) and takes_attributes_alone(code, code.co_varnames[0])


def _receive(value: Any) -> Any:
    """Return an object of which code only takes attributes, marked so; a container's methods return what it holds."""
    kind = type(value)
    plain = isinstance(value, nn.Module) or not (is_skipped(kind.__module__) or isinstance(value, _CONTAINERS))
    return _Receiver(value) if plain and kind is not type else value


def _list_members(value: Any, way: str) -> Iterator[Way]:
    """Yield what an object of one of Python's own kinds holds."""
    if isinstance(value, dict):
        for key, member in dict.items(value):
            yield key, way
            yield member, f"{way}[{key!r}]" if type(key) in CONSTANTS else way
        return
    for member in gc.get_referents(value):
        if not isinstance(member, (type, types.ModuleType)):
            yield member, way


def _has_methods(kind: type) -> bool:
    """Whether a class is one of Python's whose methods, which are not read, return what its attributes hold."""
    package = kind.__module__.partition(".")[0]
    return package in sys.stdlib_module_names and package not in _WITHOUT_METHODS


def _read_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, whatever its `__getattr__` does, or what else it holds."""
    if isinstance(value, threading.local):
        return dict(value.__dict__)
    if isinstance(value, contextvars.ContextVar):
        return {"get": value.get(None)}
    attributes: dict[str, Any] = {}
    for name in ("__dict__", *list_slots(type(value))):
        try:
            attribute = object.__getattribute__(value, name)
        except AttributeError:
            continue
        attributes |= attribute if name == "__dict__" else {name: attribute}
    return attributes


def _read_proxy(proxy: Any) -> Any:
    """Return what a weak proxy stands for; None if that is gone."""
    try:
        return proxy.__repr__.__self__
    except ReferenceError:
        return None


def list_mentioned(model: nn.Module) -> set[str] | None:
    """Return the names in all code that may run in a model's forward; None if that code may read any attribute.

    It is the code of classes, hooks and of what modules hold, and what these lead to, but none of torch.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return x * self.scale
        >>> sorted(list_mentioned(nn.Sequential(Net())))
        ['forward', 'scale']
    """
    walk = _walk_forward(model, installed=True)
    return walk.names if walk.is_whole and walk.names.isdisjoint(EVERY_ATTRIBUTE) else None


def find_strangers(model: nn.Module) -> list[Way]:
    """Return the modules and parameters of other models that the forward of a model may read, with the ways to them.

    Example:
        >>> import copy
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _ = model.register_forward_hook(lambda module, args, out: out + model[0].bias)
        >>> [way for _, way in find_strangers(copy.deepcopy(model))]  # a closure is not copied
        ['model', 'model.0']
    """
    walk = _walk_forward(model)
    own = {id(part) for part in (*model.modules(), *model.parameters())}
    parts = [(v, way) for v, way in walk.met.values() if isinstance(v, (nn.Module, nn.Parameter)) and id(v) not in own]
    return [(part, way) for part, way in parts if type(part) not in weakref.ProxyTypes]


def _walk_forward(model: nn.Module, installed: bool = False) -> Walk:
    """Return a walk from all code that may run in a model's forward."""
    modules = list(model.modules())
    walk = Walk({}, {id(module) for module in modules}, model, installed=installed, most=_MOST_OBJECTS)
    hooks = (h for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks) for h in hooks.values())
    walk.find([(value, "") for value in (*modules, *hooks)], {"forward"})
    return walk
