"""Functions that refer to the modules of a model: over those of a copy instead.

`copy.deepcopy` leaves functions as they are, so that a hook or a lambda of the copy still runs the original's modules.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch import nn

PLAIN_DICTS = frozenset((dict, OrderedDict, defaultdict))
# Values of these types never change, and hold neither a module nor a tensor.
CONSTANTS = {int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size}
_CALLABLES = {types.MethodType, functools.partial, types.FunctionType, weakref.ReferenceType}
STORES = ("_parameters", "_buffers", "_modules")


class Redirector:
    """Makes functions, bound methods, partials and weak references over the modules and tensors of a copy.

    Attributes:
        memo: by id of a module, tensor, list or dict of the original, what stands for it in the copy.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        # by id, with what they stand for: what closures share is shared afterwards too, and large data is read once
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}

    def redirect(self, value: Any) -> Any:
        """Return a callable, or what it holds, over the copy's modules where it is over the original's.

        Lists and dicts in it are copied only if they hold modules: a hook that appends to a list of the user's goes on
        appending to it.
        """
        kind = type(value)
        if kind in CONSTANTS:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if kind in _CALLABLES:
            return self._redirect_callable(value)
        if kind in PLAIN_DICTS or kind in (list, deque) or isinstance(value, tuple):
            if id(value) not in self._containers:
                self._containers[id(value)] = value, value  # one that holds itself
                self._containers[id(value)] = value, self._redirect_members(value)
            return self._containers[id(value)][1]
        return value

    def _redirect_members(self, value: Any) -> Any:
        if type(value) not in PLAIN_DICTS:
            return rebuild(value, [self.redirect(item) for item in value])
        redirected = [(self.redirect(key), self.redirect(item)) for key, item in value.items()]
        if all(a is c and b is d for (a, b), (c, d) in zip(redirected, value.items(), strict=True)):
            return value
        items = copy.copy(value)
        items.clear()
        items.update(redirected)
        return items

    def _renew_cell(self, cell: types.CellType, content: Any) -> types.CellType:
        """Return the cell that stands for another one, of which functions may share one."""
        return self._cells.setdefault(id(cell), (cell, types.CellType(content)))[1]

    def _redirect_callable(self, function: Any) -> Any:
        if type(function) is types.MethodType:
            owner = self.redirect(function.__self__)
            return function if owner is function.__self__ else types.MethodType(function.__func__, owner)
        if type(function) is weakref.ReferenceType:
            owner = self.memo.get(id(function()))
            return weakref.ref(owner) if isinstance(owner, nn.Module) else function
        if type(function) is functools.partial:
            parts = function.func, function.args, function.keywords
            redirected = [self.redirect(part) for part in parts]
            if all(a is b for a, b in zip(parts, redirected, strict=True)):
                return function
            return functools.partial(redirected[0], *redirected[1], **redirected[2])
        return self._redirect_function(function)

    def _redirect_function(self, function: types.FunctionType) -> types.FunctionType:
        """Return a function whose closure and default arguments are over the copy's modules."""
        cells = [_contents(cell) for cell in function.__closure__ or ()]
        self.memo[id(function)] = function  # a function that names itself stands in its own closure
        contents = [self.redirect(content) for content in cells]
        defaults, keywords = self.redirect(function.__defaults__), self.redirect(function.__kwdefaults__)
        same = all(a is b for a, b in zip(cells, contents, strict=True))
        if same and defaults is function.__defaults__ and keywords is function.__kwdefaults__:
            return function
        closure = tuple(
            cell if a is b else self._renew_cell(cell, b)
            for cell, a, b in zip(function.__closure__ or (), cells, contents, strict=True)
        )
        # a cell of its own for a function that stands in its own closure: the original's stays
        closure = tuple(
            types.CellType(content) if content is function else cell
            for cell, content in zip(closure, contents, strict=True)
        )
        code, scope, name = function.__code__, function.__globals__, function.__name__
        redirected = types.FunctionType(code, scope, name, defaults, closure if function.__closure__ else None)
        redirected.__kwdefaults__ = keywords
        redirected.__qualname__, redirected.__module__ = function.__qualname__, function.__module__
        redirected.__dict__.update(function.__dict__)
        self.memo[id(function)] = redirected
        for cell, content in zip(closure, contents, strict=True):
            if content is function:
                cell.cell_contents = redirected
        return redirected


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
    redirector, visited = Redirector(dict(memo)), set[int]()
    for module in model.modules():
        namespace = module.__dict__
        for name, value in list(namespace.items()):
            if name not in STORES and (adapted := _adapt(value, redirector, visited)) is not value:
                namespace[name] = adapted


def _adapt(value: Any, redirector: Redirector, visited: set[int]) -> Any:
    """Return an attribute's value with other functions in it; lists, deques and dicts, which are the copy's, change.

    It is no function in `redirect_functions`: one that calls itself would keep the copy alive.
    """
    kind = type(value)
    if kind in CONSTANTS or id(value) in visited:
        return value
    if kind in PLAIN_DICTS or kind in (list, deque):
        visited.add(id(value))
        for key, item in list(value.items() if kind in PLAIN_DICTS else enumerate(value)):
            if (adapted := _adapt(item, redirector, visited)) is not item:
                value[key] = adapted
        return value
    if isinstance(value, tuple):
        return rebuild(value, [_adapt(item, redirector, visited) for item in value])
    return redirector.redirect(value) if kind in _CALLABLES else value


def rebuild(value: Any, members: list[Any]) -> Any:
    """Return a list, deque or tuple like this one, of these members; it itself if they are the members that it has.

    A tuple of the user's own class, unless it is a named one, stays as it is: nobody knows how to make another.
    """
    kind = type(value)
    if all(a is b for a, b in zip(members, value, strict=True)):
        return value
    if kind is deque:
        return deque(members, value.maxlen)
    return value._make(members) if hasattr(value, "_make") else kind(members) if kind in (list, tuple) else value


def _contents(cell: types.CellType) -> Any:
    """Return what a closure's cell holds; None if it is empty yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
