"""Where numbers come from: a module's attribute, the length of a dimension, or arithmetic with both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

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
    """The number was computed from other numbers.

    Attributes:
        compute: the function that computed it.
        inputs: what it got: numbers with and without an origin.
        proportional: it doubles if all sizes among these double.
        factors: it is a product or quotient, and doubles if any one of these doubles while all others stay.
        is_difference: it is the first input minus the second, and both are sizes.
        is_quotient: it is the first input divided by the second, and both are sizes.
    """

    compute: Callable[..., Any]
    inputs: tuple[Any, ...]
    proportional: bool = False
    factors: tuple[Number, ...] = ()
    is_difference: bool = False
    is_quotient: bool = False

    @property
    def operands(self) -> tuple[Number, ...]:
        """The inputs that are lengths, or shares of them."""
        return tuple(value for value in self.inputs if isinstance(value, Number) and value.is_length)


Origin = FromAttribute | FromDimension | FromExpression


class Number:
    """A number that remembers where it comes from. Copies and pickles are ordinary numbers.

    Attributes:
        origin: where it comes from.
        is_length: it is a length, or a share of one.
    """

    origin: Any
    is_length: ClassVar[bool] = False

    def __new__(cls, value: Any = 0, origin: Origin | None = None) -> Any:
        """Return `value` with this origin; without one, as by `type(size)(3)`, an ordinary number."""
        if origin is None:
            return int(value) if issubclass(cls, int) else float(value)
        number = super().__new__(cls, value)  # type: ignore[call-arg]
        number.origin = origin
        return number

    def __int__(self) -> int:
        return int(strip_origin(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return strip_origin(self)

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        value = strip_origin(self)
        return type(value), (value,)


def strip_origin(number: Any) -> Any:
    """Return a number without its origin."""
    return int.__int__(number) if isinstance(number, int) else float.__float__(number)


def evaluate(number: Any, get_value: Callable[[Number], int]) -> Any:
    """Return what a number would be if attributes and dimensions had these values."""
    if not isinstance(number, Number):
        return number
    origin = number.origin
    if not isinstance(origin, FromExpression):
        return get_value(number)
    return origin.compute(*(evaluate(value, get_value) for value in origin.inputs))


def list_leaves(numbers: tuple[Any, ...]) -> Iterator[Number]:
    """Yield the attributes and dimensions that decide any of these numbers."""
    for number in numbers:
        if isinstance(number, Number):
            expression = isinstance(number.origin, FromExpression)
            yield from list_leaves(number.origin.inputs) if expression else (number,)


def is_proportional(size: Number) -> bool:
    """Whether `size` doubles if every attribute and dimension that it was computed from doubles."""
    return not isinstance(size.origin, FromExpression) or size.origin.proportional


def find_leaves(size: Number) -> Iterator[Number]:
    """Yield the attributes and dimensions that `size` was computed from as a length."""
    if isinstance(size.origin, FromExpression):
        for operand in size.origin.operands:
            yield from find_leaves(operand)
    else:
        yield size


def find_factors(size: Number) -> tuple[Number, ...]:
    """Return the attributes and dimensions of which any one doubles `size` if it doubles and the others stay."""
    if not isinstance(size.origin, FromExpression):
        return (size,)
    if size.origin.proportional and len(size.origin.operands) == 1:
        return find_factors(size.origin.operands[0])
    return tuple(leaf for factor in size.origin.factors for leaf in find_factors(factor))


def find_quotient(size: Number) -> tuple[Number, ...] | None:
    """Return a and b if `size` is a // b, and each is proportional to one attribute or dimension; else None."""
    if not isinstance(size.origin, FromExpression) or not size.origin.is_quotient:
        return None
    operands = size.origin.operands
    return operands if all(is_proportional(v) and len(list(find_leaves(v))) == 1 for v in operands) else None
