"""The names in the code of functions, and which functions reach which by them."""

from __future__ import annotations

import dis
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from types import CodeType

LRU_CACHED = type(lru_cache(lambda: None))
# Special methods that no call, operator or index in a forward runs.
ASIDE = frozenset(
    f"__{name}__"
    for name in (
        "init", "new", "init_subclass", "post_init", "set_name", "del", "getstate", "setstate", "reduce", "reduce_ex",
        "deepcopy", "copy", "sizeof", "dir",
    )
)  # fmt: skip
# Instructions: those that load a variable, those that take or set an attribute of what was loaded, and so on.
_LOADS = {"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_DEREF", "LOAD_CLASSDEREF"}
_OF_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR"}
_COPIES = {"COPY", "DUP_TOP"}
_OF_OTHERS = {*_OF_ATTRIBUTES, "LOAD_CONST", "LOAD_GLOBAL", "MAKE_CELL", "LOAD_CLOSURE"}  # another thing of that name
_NO_STEPS = {"CACHE", "RESUME", "NOP", "COPY_FREE_VARS", "EXTENDED_ARG"}


def list_codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from list_codes(constant)


@lru_cache(4096)
def list_names(code: CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes in the code of a function, and of the functions inside it."""
    return tuple(name for part in list_codes(code) for name in part.co_names)


@lru_cache(4096)
def list_globals(code: CodeType) -> tuple[str, ...]:
    """Return the names that the code of a function, or of a function inside it, reads as globals or imports."""
    steps = (step for part in list_codes(code) for step in dis.get_instructions(part))
    return tuple({step.argval: None for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")})


def reach_names(start: Iterable[str], functions: Collection[str], mention: Callable[[str], Iterable[str]]) -> list[str]:
    """Return which functions these names reach: themselves, those that they mention, which those mention, and so on.

    Args:
        start: names.
        functions: the names of functions; others are passed over.
        mention: returns the names in a function.
    """
    reached: dict[str, None] = {}
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name in functions and name not in reached:
            reached[name] = None
            waiting += mention(name)
    return [*reached]


@lru_cache(4096)
def takes_attributes_alone(code: CodeType, name: str) -> bool:
    """Whether code does nothing with a variable of its own, or of a closure, but to take or set its attributes.

    Example:
        >>> def function(a, b):
        ...     return a.scale * b(1)
        >>> takes_attributes_alone(function.__code__, "a"), takes_attributes_alone(function.__code__, "b")
        (True, False)
    """
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]
    for index, step in enumerate(steps):
        if step.argval == name or (isinstance(step.argval, tuple) and name in step.argval):
            after = next((s.opname for s in steps[index + 1 : index + 3] if s.opname not in _COPIES), "")
            if step.opname not in _OF_OTHERS and not (step.opname in _LOADS and after in _OF_ATTRIBUTES):
                return False
    return all(takes_attributes_alone(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))
