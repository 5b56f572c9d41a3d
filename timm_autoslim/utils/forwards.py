"""What the forward of a module class stores, as its code says: such attributes are state, and no settings."""

from __future__ import annotations

import dis
import inspect
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from itertools import chain
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from timm_autoslim.utils.codes import ASIDE, list_codes, list_names, reach_names

# the code of a class is looked at once
_NAMES: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()
_MENTIONED: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def list_stored_names(kind: type) -> frozenset[str]:
    """Return the names of the attributes that a class's forward stores, or a method that it calls, or so on.

    Example:
        >>> import torch
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale, self.calls = 2, 0
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         return x * self.scale
        >>> sorted(list_stored_names(Net))
        ['calls']
    """
    if kind not in _NAMES:
        reached = [code for outer in _list_forward_codes(kind) for code in list_codes(outer)]
        stored = (step.argval for code in reached for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")
        _NAMES[kind] = frozenset(stored)
    return _NAMES[kind]


def list_mentioned_names(kind: type) -> frozenset[str]:
    """Return the names of attributes and globals in the code of a class's forward, and of what it calls of the class.

    Example:
        >>> import torch
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return self.double(x)
        ...     def double(self, x):
        ...         return x * self.scale
        ...     def reset(self):
        ...         self.mode = 0
        >>> sorted(list_mentioned_names(Net))
        ['double', 'forward', 'scale']
    """
    if kind not in _MENTIONED:
        _MENTIONED[kind] = frozenset({"forward"}.union(*map(list_names, _list_forward_codes(kind))))
    return _MENTIONED[kind]


def _list_forward_codes(kind: type) -> list[CodeType]:
    """Return the code of a class's forward, of the methods and properties that it names, and so on; none of torch's."""
    codes = defaultdict[str, list[CodeType]](list)
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, member in vars(base).items():
                for function in map(inspect.unwrap, _list_functions(member)):
                    if isinstance(function, FunctionType):
                        codes[name].append(function.__code__)
    starts = [name for name in codes if name == "forward" or (name.startswith("__") and name not in ASIDE)]
    names = reach_names(starts, codes.keys() - ASIDE, lambda name: chain(*map(list_names, codes[name])))
    return [code for name in names for code in codes[name]]


def _list_functions(member: Any) -> list[Callable[..., Any]]:
    """Return the functions that a member of a class stands for."""
    if isinstance(member, property):
        return [function for function in (member.fget, member.fset) if function is not None]
    if isinstance(member, (staticmethod, classmethod)):
        return [member.__func__]
    return [member.func] if isinstance(member, cached_property) else [member] if callable(member) else []
