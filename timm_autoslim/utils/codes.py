"""The names in the code of functions, and which functions reach which by them."""

from __future__ import annotations

import dis
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from types import CodeType


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
