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
    """The integer was computed from other sizes.

    Attributes:
        proportional: it scales as the one size that it was computed from.
        factors: it is a product or quotient of several sizes, and scales as any one of these while all others stay.
        difference: it is the first operand less the second.
        quotient: it is the first operand divided by the second.
    """

    operands: tuple[Size, ...]
    proportional: bool
    factors: tuple[Size, ...] = ()
    difference: bool = False
    quotient: bool = False


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


def factors(size: Size) -> tuple[Size, ...]:
    """Return the attributes and dimensions of which any one can make `size` scale while the others stay."""
    if not isinstance(size.origin, FromExpression):
        return (size,)
    if size.origin.proportional and len(size.origin.operands) == 1:
        return factors(size.origin.operands[0])
    return tuple(leaf for factor in size.origin.factors for leaf in factors(factor))


def quotient(size: Size) -> tuple[Size, ...] | None:
    """Return a and b if `size` is a // b, and both of them scale as one size."""
    if not isinstance(size.origin, FromExpression) or not size.origin.quotient:
        return None
    operands = size.origin.operands
    return operands if all(is_proportional(v) and len(list(leaves(v))) == 1 for v in operands) else None


def _derived(compute: Callable[[Any, Any], Any], swap: bool) -> Callable[[Size, Any], Any]:
    def method(self: Size, other: Any) -> Any:
        if not isinstance(other, int):
            a, b = (other, int(self)) if swap else (int(self), other)
            return compute(a, b)
        a, b = (int(other), int(self)) if swap else (int(self), int(other))
        operands = tuple(v for v in (self, other) if isinstance(v, Size))
        scales = all(map(is_proportional, operands))
        multiplied = {operator.mul: operands, operator.floordiv: operands[:1]}.get(compute, ())
        either = multiplied if len(operands) == 2 and all(map(factors, operands)) else ()
        if compute in (operator.add, operator.sub):
            scales = scales and len(operands) == 2  # a constant that is added does not scale
        else:
            scales = scales and len(operands) == 1 and not (swap and compute is operator.floordiv)
        first, ratio = len(operands) == 2 and not swap, compute is operator.floordiv
        origin = FromExpression(operands, scales, either, first and compute is operator.sub, first and ratio)
        return Size(compute(a, b), origin)

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
