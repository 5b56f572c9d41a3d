"""Functions of Python's `math` on numbers that remember where they come from: so do their results."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm_autoslim.tracing.origins import Number
from timm_autoslim.tracing.sizes import derive

_OF_NUMBERS = frozenset({"floor", "ceil", "trunc", "prod"})  # these ask the numbers themselves


def _follow(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes the same, and gives numbers an origin if one that it gets has one."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if any(isinstance(value, Number) for value in args):
            return derive(functools.partial(function, **options) if options else function, *args)
        if len(args) == 1 and isinstance(args[0], (list, tuple)) and any(isinstance(v, Number) for v in args[0]):
            return derive(_Listed(function), *args[0])  # of a list, as `fsum` gets
        return function(*args, **options)

    return call


@dataclass(frozen=True)
class _Listed:
    """A function of a list, as a function of its members."""

    function: Callable[..., Any]

    def __call__(self, *members: Any) -> Any:
        return self.function(members)


# By function of `math`, what takes its place in a run.
MATH: dict[Any, Callable[..., Any]] = {
    function: _follow(function)
    for name, function in vars(math).items()
    if isinstance(function, types.BuiltinFunctionType) and name not in _OF_NUMBERS
}
