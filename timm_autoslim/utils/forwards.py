"""What the forward of a module class stores, as its code says: such attributes are state, and no settings."""

from __future__ import annotations

import dis
import inspect
from collections import defaultdict
from itertools import chain
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

from timm_autoslim.utils.codes import list_codes, list_names, reach_names

_NAMES: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()  # the code of a class is looked at once


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
        codes = defaultdict[str, list[CodeType]](list)
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] not in ("torch", "builtins"):
                for name, member in vars(base).items():
                    function = inspect.unwrap(member) if callable(member) else None
                    if isinstance(function, FunctionType):
                        codes[name].append(function.__code__)
        names = reach_names(["forward"], codes.keys() - {"__init__"}, lambda name: chain(*map(list_names, codes[name])))
        reached = [code for name in names for outer in codes[name] for code in list_codes(outer)]
        stored = (step.argval for code in reached for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")
        _NAMES[kind] = frozenset(stored)
    return _NAMES[kind]
