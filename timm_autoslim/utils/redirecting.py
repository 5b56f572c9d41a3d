"""Functions that refer to the modules of a model: over those of a copy instead.

`copy.deepcopy` leaves functions as they are, so that a hook or a lambda of the copy still runs the original's modules.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

PLAIN_DICTS = frozenset((dict, OrderedDict, defaultdict))
# Values of these types never change, and hold neither a module nor a tensor.
CONSTANTS = {int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size}
_CALLABLES = {
    types.MethodType, types.BuiltinMethodType, functools.partial, types.FunctionType, weakref.ReferenceType
}  # fmt: skip
_GROUPS = (list, deque, set, frozenset)
STORES = ("_parameters", "_buffers", "_modules")


class Redirector:
    """Makes functions, bound methods, partials and weak references over the modules and tensors of a copy.

    Attributes:
        memo: by id of a module, tensor, list or dict of the original, what stands for it in the copy.
        others: functions that it has met, and objects that it does not look into: they may lead to the original.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.others: list[Any] = []
        # by id, with the value itself: whether it leads to something in `memo`; large data is read once
        self._leads: dict[int, tuple[Any, bool]] = {}
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}  # what functions share is shared afterwards

    def redirect(self, value: Any) -> Any:
        """Return a callable, or what it holds, over the copy's modules where it is over the original's.

        Lists, sets and dicts in it are copied only if they lead to modules: a hook that appends to a list of the user's
        goes on appending to it.
        """
        if type(value) in CONSTANTS:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        return self._rebuild(value) if self._is_leading(value) else value

    def _is_leading(self, start: Any) -> bool:
        """Whether a value leads to something that has another object in its place in the copy."""
        if id(start) in self._leads:
            return self._leads[id(start)][1]
        memo, known = self.memo, self._leads
        met, parents = dict[int, Any](), defaultdict[int, list[int]](list)
        waiting, ends = [start], list[int]()  # the ends of ways: what is in the copy
        while waiting:
            value = waiting.pop()
            if id(value) in met:
                continue
            met[id(value)] = value
            members = _list_members(value)
            if (members is None and not isinstance(value, Enum)) or type(value) is types.FunctionType:
                self.others.append(value)
            for member in members or ():
                key = id(member)
                if type(member) in CONSTANTS:
                    continue
                parents[key].append(id(value))
                if key in memo or key in known:
                    ends += [key] if (memo[key] is not member if key in memo else known[key][1]) else []
                else:
                    waiting.append(member)
        leading = set[int]()
        while ends:
            above = set(parents[ends.pop()]) - leading
            leading |= above
            ends += above
        known |= {key: (value, key in leading) for key, value in met.items()}
        return id(start) in leading

    def _rebuild(self, value: Any) -> Any:
        """Return another object in place of one that leads to modules."""
        kind = type(value)
        if kind is types.FunctionType:
            return self._rebuild_function(value)
        if kind in PLAIN_DICTS or kind in (list, deque, set):
            copied = self.memo[id(value)] = copy.copy(value)
            fill(copied, value, self.redirect)
            return copied
        return self.memo.setdefault(id(value), self._rebuild_constant(value))  # a list in a tuple may hold that tuple

    def _rebuild_constant(self, value: Any) -> Any:
        """Return another object in place of one that cannot be made before what it holds."""
        if isinstance(value, (tuple, frozenset)):
            return rebuild(value, [self.redirect(item) for item in value])
        if type(value) is weakref.ReferenceType:
            return weakref.ref(self.memo[id(value())])
        if type(value) is functools.partial:
            function, arguments = self.redirect(value.func), self.redirect(value.args)
            partial = functools.partial(function, *arguments, **self.redirect(value.keywords))
            partial.__dict__.update(self.redirect(value.__dict__))
            return partial
        owner = self.redirect(value.__self__)
        if type(value) is types.MethodType:
            return types.MethodType(self.redirect(value.__func__), owner)
        return getattr(owner, value.__name__)

    def _rebuild_function(self, function: types.FunctionType) -> types.FunctionType:
        """Return a function whose closure, default arguments and attributes are over the copy's modules."""
        cells = {id(cell): cell for cell in function.__closure__ or () if self._holds_originals(cell)}
        renewed = [cell for key, cell in cells.items() if key not in self._cells]
        self._cells |= {id(cell): (cell, types.CellType()) for cell in renewed}
        closure = tuple(self._cells[id(cell)][1] if id(cell) in cells else cell for cell in function.__closure__ or ())
        code, scope, name = function.__code__, function.__globals__, function.__name__
        redirected = types.FunctionType(code, scope, name, None, closure)
        self.memo[id(function)] = redirected  # before its cells are filled: it may stand in its own closure
        redirected.__qualname__, redirected.__module__ = function.__qualname__, function.__module__
        redirected.__defaults__ = self.redirect(function.__defaults__)
        redirected.__kwdefaults__ = self.redirect(function.__kwdefaults__)
        redirected.__dict__.update(self.redirect(function.__dict__))
        for cell in renewed:
            self._cells[id(cell)][1].cell_contents = self.redirect(cell.cell_contents)
        return redirected

    def _holds_originals(self, cell: types.CellType) -> bool:
        """Whether another object is to stand in a closure's cell."""
        content = read_cell(cell)
        if type(content) in CONSTANTS:
            return False
        return self.memo[id(content)] is not content if id(content) in self.memo else self._is_leading(content)


def _list_members(value: Any) -> Iterable[Any] | None:
    """Return what a value holds, if the `Redirector` makes others of its kind; else None."""
    kind = type(value)
    if kind in PLAIN_DICTS:
        return [*value, *value.values()]
    if kind in _GROUPS or isinstance(value, tuple):
        return value  # type: ignore[no-any-return]
    if kind is types.FunctionType:
        contents = map(read_cell, value.__closure__ or ())
        return [*contents, value.__defaults__, value.__kwdefaults__, value.__dict__]
    if kind is functools.partial:
        return value.func, value.args, value.keywords, value.__dict__
    if kind is types.MethodType:
        return value.__self__, value.__func__
    if kind is types.BuiltinMethodType:
        return () if isinstance(value.__self__, types.ModuleType) else (value.__self__,)
    return [value()] if kind is weakref.ReferenceType and isinstance(value(), (nn.Module, Tensor)) else None


def redirect_functions(model: nn.Module, memo: dict[int, Any]) -> None:
    """Let the functions that a deep copy of a model holds refer to its own modules, in place of the original's.

    Args:
        model: the copy. Its attributes and hooks are looked at, and the lists, deques, tuples and dicts in them.
        memo: the one of `copy.deepcopy`: by id of an object of the original, what stands for it in the copy.

    Example:
        >>> import copy, torch
        >>> def attach(model):
        ...     model.find = lambda: model
        >>> model, memo = torch.nn.Linear(2, 2), {}
        >>> attach(model)
        >>> copied = copy.deepcopy(model, memo)
        >>> copied.find() is model
        True
        >>> redirect_functions(copied, memo)
        >>> copied.find() is copied
        True
    """
    redirector, adapted = Redirector(dict(memo)), dict[int, tuple[Any, Any]]()
    for module in model.modules():
        namespace = module.__dict__
        for name, value in list(namespace.items()):
            if type(value) not in CONSTANTS and name not in STORES:
                namespace[name] = _adapt(value, redirector, adapted)


def _adapt(value: Any, redirector: Redirector, adapted: dict[int, tuple[Any, Any]]) -> Any:
    """Return an attribute's value with other functions in it; lists, deques, sets and dicts, the copy's own, change.

    It is no function in `redirect_functions`: one that calls itself would keep the copy alive.

    Args:
        value: the value.
        redirector: it makes the functions.
        adapted: by id, what was adapted, with what takes its place.
    """
    kind = type(value)
    if kind in _CALLABLES:
        return redirector.redirect(value)
    is_constant = isinstance(value, (tuple, frozenset))
    if not (is_constant or kind in PLAIN_DICTS or kind in _GROUPS) or not value:
        return value
    if id(value) in adapted:
        return adapted[id(value)][1]
    adapted[id(value)] = value, value
    if not is_constant:
        fill(value, copy.copy(value), lambda item: _adapt(item, redirector, adapted))
        return value
    adapted[id(value)] = value, rebuild(value, [_adapt(item, redirector, adapted) for item in value])
    return adapted[id(value)][1]


def fill(copied: Any, value: Any, change: Callable[[Any], Any]) -> None:
    """Let a copy of a dict, list, deque or set hold what stands for its members, where that is something else."""
    members = [*chain.from_iterable(value.items())] if isinstance(value, dict) else list(value)
    changed = [change(member) for member in members]
    if all(map(is_, members, changed)):
        return
    copied.clear()
    if isinstance(value, dict):
        copied.update(zip(changed[::2], changed[1::2], strict=True))
    else:
        (copied.update if isinstance(value, set) else copied.extend)(changed)


def rebuild(value: Any, members: list[Any]) -> Any:
    """Return a tuple or frozenset like this one, of these members; it itself if they are the members that it has.

    A tuple of the user's own class, unless it is a named one, stays as it is: nobody knows how to make another.
    """
    kind = type(value)
    if all(a is b for a, b in zip(members, value, strict=True)):
        return value
    return value._make(members) if hasattr(value, "_make") else kind(members) if kind in (tuple, frozenset) else value


def read_cell(cell: types.CellType) -> Any:
    """Return what a closure's cell holds; None if it is empty yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
