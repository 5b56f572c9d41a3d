"""What takes the place of functions in a run: those of `math` pass on where numbers come from.

`torch.is_grad_enabled` tells that it was asked.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from timm_autoslim.tracing.origins import Number
from timm_autoslim.tracing.sizes import derive
from timm_autoslim.tracing.watching import is_grad_enabled, is_of_model

_OVERRIDES = tuple(getattr(torch.overrides, f"has_torch_function{kind}") for kind in ("", "_unary", "_variadic"))
_ORDINARY = (Tensor.__torch_function__, nn.Parameter.__torch_function__)
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


def _ask_outside(function: Callable[..., bool]) -> Callable[..., bool]:
    """Return a function that answers the model's code as without the modes of a run."""

    @functools.wraps(function)
    def call(*args: Any) -> bool:
        if not is_of_model(sys._getframe(1)):
            return function(*args)
        kinds = {type(arg) for arg in tree_leaves(args) if hasattr(type(arg), "__torch_function__")}
        return any(kind.__torch_function__ not in _ORDINARY for kind in kinds)

    return call


# By function, what takes its place in a run, and in which of torch's and Python's modules it does.
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **MATH,
    torch.is_grad_enabled: is_grad_enabled,
    **{function: _ask_outside(function) for function in _OVERRIDES},
}
HOMES = (math, torch, torch._C, torch.overrides)
