"""Integers that remember where they came from: a module's attribute, a tensor's dimension, or arithmetic on both."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from timm_autoslim.tracing.labels import Vector


@dataclass(frozen=True)
class FromAttribute:
    """The integer is `model.<path>`; an element of a tuple or list has its index as the last part of the path."""

    path: str


@dataclass(frozen=True, eq=False)
class FromDimension:
    """The integer is the length of a tensor's dimension that carries `vector`."""

    vector: Vector


@dataclass(frozen=True, eq=False)
class FromExpression:
    """The integer was computed from other sizes; `proportional` if it scales as they do."""

    operands: tuple[Size, ...]
    proportional: bool


class Size(int):
    """An int with an origin. Arithmetic with it builds expressions; everything else sees a plain int."""

    origin: FromAttribute | FromDimension | FromExpression

    def __new__(cls, value: int, origin: FromAttribute | FromDimension | FromExpression) -> Size:
        """Wrap `value`."""
        size = super().__new__(cls, value)
        size.origin = origin
        return size

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return (int, (int(self),))


def is_proportional(size: Size) -> bool:
    """Whether `size` doubles when everything that it was computed from doubles."""
    return not isinstance(size.origin, FromExpression) or size.origin.proportional


def _derived(compute: Callable[[Any, Any], Any], swap: bool) -> Callable[[Size, Any], Any]:
    def method(self: Size, other: Any) -> Any:
        if not isinstance(other, int):
            a, b = (other, int(self)) if swap else (int(self), other)
            return compute(a, b)
        a, b = (int(other), int(self)) if swap else (int(self), int(other))
        operands = tuple(v for v in (self, other) if isinstance(v, Size))
        scales = all(map(is_proportional, operands))
        if compute in (operator.add, operator.sub):
            scales = scales and len(operands) == 2  # a constant that is added does not scale
        else:
            scales = scales and len(operands) == 1 and not (swap and compute is operator.floordiv)
        return Size(compute(a, b), FromExpression(operands, scales))

    return method


for _name in ("add", "sub", "mul", "floordiv"):
    setattr(Size, f"__{_name}__", _derived(getattr(operator, _name), swap=False))
    setattr(Size, f"__r{_name}__", _derived(getattr(operator, _name), swap=True))


def leaves(size: Size) -> Iterator[Size]:
    """Yield the attributes and dimensions that `size` was computed from."""
    if isinstance(size.origin, FromExpression):
        for operand in size.origin.operands:
            yield from leaves(operand)
    else:
        yield size


def _wrapped(value: Any, path: str) -> Any:
    if type(value) is int:
        return Size(value, FromAttribute(path))
    if type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        return type(value)(Size(v, FromAttribute(f"{path}.{i}")) for i, v in enumerate(value))
    return value


def wrap_attributes(model: nn.Module) -> None:
    """Replace every integer attribute (also in tuples and lists) of every module by one that knows its path."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in list(module.__dict__.items()):
            if not name.startswith("_"):
                module.__dict__[name] = _wrapped(value, prefix + name)
