"""What the forward of a module class stores, as its code says: such attributes are state, and no settings."""

from __future__ import annotations

import dis
import inspect
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

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
        stored, waiting, visited = set[str](), ["forward"], set[str]()
        while waiting:
            name = waiting.pop()
            if name not in visited and name != "__init__":
                visited.add(name)
                for code in [inner for outer in codes.get(name, ()) for inner in _list_codes(outer)]:
                    stored.update(str(i.argval) for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")
                    waiting += code.co_names
        _NAMES[kind] = frozenset(stored)
    return _NAMES[kind]


def _list_codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _list_codes(constant)
