"""Integers with an origin: a module's attribute, the length of a dimension, or arithmetic with both."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
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
        operands: these sizes.
        proportional: it doubles if all operands double.
        factors: it is a product or quotient, and doubles if any one of these doubles while all others stay.
        is_difference: it is the first operand minus the second.
        is_quotient: it is the first operand divided by the second.
    """

    operands: tuple[Size, ...]
    proportional: bool
    factors: tuple[Size, ...] = ()
    is_difference: bool = False
    is_quotient: bool = False


class Size(int):
    """An int with an origin. Integer arithmetic with it gives another `Size`; anything else treats it as an int."""

    origin: FromAttribute | FromDimension | FromExpression

    def __new__(cls, value: int, origin: FromAttribute | FromDimension | FromExpression) -> Size:
        """Return `value` with this origin."""
        size = super().__new__(cls, value)
        size.origin = origin
        return size

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return (int, (int(self),))


def is_proportional(size: Size) -> bool:
    """Whether `size` doubles if every attribute and dimension that it was computed from doubles."""
    return not isinstance(size.origin, FromExpression) or size.origin.proportional


def find_leaves(size: Size) -> Iterator[Size]:
    """Yield the attributes and dimensions that `size` was computed from."""
    if isinstance(size.origin, FromExpression):
        for operand in size.origin.operands:
            yield from find_leaves(operand)
    else:
        yield size


def find_factors(size: Size) -> tuple[Size, ...]:
    """Return the attributes and dimensions of which any one doubles `size` if it doubles and the others stay."""
    if not isinstance(size.origin, FromExpression):
        return (size,)
    if size.origin.proportional and len(size.origin.operands) == 1:
        return find_factors(size.origin.operands[0])
    return tuple(leaf for factor in size.origin.factors for leaf in find_factors(factor))


def find_quotient(size: Size) -> tuple[Size, ...] | None:
    """Return a and b if `size` is a // b, and each is proportional to one attribute or dimension; else None."""
    if not isinstance(size.origin, FromExpression) or not size.origin.is_quotient:
        return None
    operands = size.origin.operands
    return operands if all(is_proportional(v) and len(list(find_leaves(v))) == 1 for v in operands) else None


# -- arithmetic -----------------------------------------------------------------------------------------------------


def _make_method(compute: Callable[[Any, Any], Any], swap: bool) -> Callable[[Size, Any], Any]:
    """Return the method of `Size` for one operator of Python; with `swap` the one for a `Size` on the right."""

    def method(self: Size, other: Any) -> Any:
        if not isinstance(other, int):
            a, b = (other, int(self)) if swap else (int(self), other)
            return compute(a, b)
        a, b = (int(other), int(self)) if swap else (int(self), int(other))
        operands = tuple(v for v in (self, other) if isinstance(v, Size))
        proportional = all(map(is_proportional, operands))
        multiplied = {operator.mul: operands, operator.floordiv: operands[:1]}.get(compute, ())
        factors = multiplied if len(operands) == 2 and all(map(find_factors, operands)) else ()
        if compute in (operator.add, operator.sub):
            proportional = proportional and len(operands) == 2  # a constant that is added does not double
        else:
            proportional = proportional and len(operands) == 1 and not (swap and compute is operator.floordiv)
        both = len(operands) == 2 and not swap
        is_difference, is_quotient = both and compute is operator.sub, both and compute is operator.floordiv
        return Size(compute(a, b), FromExpression(operands, proportional, factors, is_difference, is_quotient))

    return method


for _name in ("add", "sub", "mul", "floordiv"):
    setattr(Size, f"__{_name}__", _make_method(getattr(operator, _name), swap=False))
    setattr(Size, f"__r{_name}__", _make_method(getattr(operator, _name), swap=True))


# -- where sizes enter a trace --------------------------------------------------------------------------------------


@dataclass
class FunctionCall:
    """A call of a torch function, with the arguments as the model's code wrote them."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def _list_sizes(self) -> list[list[int]]:
        """Return every list of integers among the arguments, and last all arguments that are integers themselves."""
        lists: list[list[int]] = []
        integers: list[int] = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, (tuple, list)) and value and all(isinstance(v, int) for v in value):
                lists.append(list(value))
            elif isinstance(value, int) and not isinstance(value, bool):
                integers.append(value)
        return [*lists, integers]

    def find_sizes(self, sizes: Sequence[int]) -> Sequence[int] | None:
        """Return the argument that holds these sizes, with their origins (-1 matches any size), or None."""
        for candidate in self._list_sizes():
            if len(candidate) == len(sizes) and all(
                a == b or a == -1 or b == -1 for a, b in zip(candidate, sizes, strict=True)
            ):
                return candidate
        return None

    def find_size(self, value: int) -> int:
        """Return the argument that equals `value` and has an origin, or `value` if there is none."""
        for candidate in self._list_sizes():
            for size in candidate:
                if size == value and isinstance(size, Size):
                    return size
        return value


def _wrap_integers(value: Any, path: str) -> Any:
    if type(value) is int:
        return Size(value, FromAttribute(path))
    if type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        return type(value)(Size(v, FromAttribute(f"{path}.{i}")) for i, v in enumerate(value))
    return value


def wrap_attributes(model: nn.Module) -> None:
    """Give every integer attribute of every module, also in tuples and lists, its path as the origin."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in list(module.__dict__.items()):
            if not name.startswith("_"):
                module.__dict__[name] = _wrap_integers(value, prefix + name)
