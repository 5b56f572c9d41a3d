"""Integers and floats that remember where they come from, through arithmetic."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from timm_autoslim.tracing.origins import FromExpression, Number, Origin, find_factors, is_proportional, strip_origin
from timm_autoslim.tracing.watching import note_check, note_comparison, note_lookup, note_ordinary, note_truth


def _make_comparison(compute: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    """Return the method for one comparison."""

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        note_comparison(compute, self, other)
        return compute(strip_origin(self), strip_origin(other))

    return method


class _Watched(Number):
    """A number whose comparisons and lookups the watcher learns of."""

    __eq__ = _make_comparison(operator.eq)
    __ne__ = _make_comparison(operator.ne)
    __lt__ = _make_comparison(operator.lt)
    __le__ = _make_comparison(operator.le)
    __gt__ = _make_comparison(operator.gt)
    __ge__ = _make_comparison(operator.ge)

    def __bool__(self) -> bool:
        note_truth(self)
        return bool(strip_origin(self))

    def __hash__(self) -> int:
        note_lookup(self)
        return hash(strip_origin(self))

    def __pos__(self) -> Any:
        return self

    def __neg__(self) -> Any:
        return derive(operator.neg, self)

    def __abs__(self) -> Any:
        return derive(operator.abs, self)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Run a function of numpy; of numbers it is one that remembers where it comes from."""
        # numpy hands its own numbers on as arrays without dimensions
        inputs = tuple(v.item() if isinstance(v, np.ndarray | np.generic) and not v.ndim else v for v in inputs)
        ordinary = [strip_origin(value) if isinstance(value, Number) else value for value in inputs]
        result = getattr(function, method)(*ordinary, **options)
        if method != "__call__" or options or not isinstance(result, np.generic):
            return result
        if isinstance(result, np.bool_):
            note_check(function, inputs)
            return result
        number = derive(_AsPython(function), *inputs)
        if isinstance(number, Number):
            number.__dict__["generic"] = result
        return number

    def __getattr__(self, name: str) -> Any:
        """Return what a number of numpy has, such as `item`, if a function of numpy has computed this one."""
        generic = self.__dict__.get("generic")
        if generic is None or name.startswith("__"):
            raise AttributeError(name)
        return (lambda: self) if name in ("item", "tolist") else getattr(generic, name)


@dataclass(frozen=True)
class _AsPython:
    """A function of numpy whose result is a number of Python."""

    function: Callable[..., Any]

    def __call__(self, *values: Any) -> Any:
        return self.function(*values).item()


@dataclass(frozen=True)
class _Rounded:
    """A quotient or another share of a size, rounded to an integer."""

    function: Callable[[Any], int]
    compute: Callable[..., Any]

    def __call__(self, *values: Any) -> int:
        return self.function(self.compute(*values))


def derive(compute: Callable[..., Any], *inputs: Any) -> Any:
    """Return what a function computes from numbers, with these as origin: an `Integer` or a `Real`, which is no length.

    What is neither an integer nor a float has no origin; a truth value is a question about the numbers.
    """
    result = compute(*(strip_origin(value) if isinstance(value, Number) else value for value in inputs))
    if type(result) is bool:
        note_check(compute, inputs)
    kind = {int: Integer, float: Real}.get(type(result))
    return result if kind is None else kind(result, FromExpression(compute, inputs))


class Integer(_Watched, int):
    """An integer that was computed from sizes; itself it is no length: a remainder, a power, a negative."""

    origin: Origin

    def __truediv__(self, other: Any) -> Any:
        return derive(operator.truediv, self, other) if _is_number(other) else int.__int__(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        return derive(operator.truediv, other, self) if _is_number(other) else other / int.__int__(self)

    def __invert__(self) -> Any:
        return derive(operator.invert, self)

    def __floor__(self) -> Any:
        return self

    __ceil__ = __trunc__ = conjugate = __floor__

    def __round__(self, digits: Any = None) -> Any:
        return self if digits is None else round(strip_origin(self), digits)

    real = numerator = property(__floor__)

    def bit_length(self) -> Any:
        """Return the number of bits."""
        return derive(int.bit_length, self)

    def bit_count(self) -> Any:
        """Return the number of bits that are 1."""
        return derive(_count_bits, self)


def _count_bits(value: int) -> int:
    return bin(value).count("1")


class Size(Integer):
    """A length with an origin. Sums, products and quotients of it are sizes again.

    Attributes:
        is_guess: the code passed an ordinary integer, which it may have made of this size.
    """

    is_length = True
    is_guess = False

    def __int__(self) -> int:
        note_ordinary(self)
        return int.__int__(self)

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, int):
            quotient: Any = self // other
            return Ratio(int.__int__(self) / other, replace(quotient.origin, compute=operator.truediv))
        return self._share(operator.truediv, other)

    def _share(self, compute: Callable[[Any, Any], Any], other: Any) -> Any:
        """Return this size by a float."""
        result = compute(int.__int__(self), other)
        if type(other) is not float or type(result) is not float:
            return result
        return Ratio(result, FromExpression(compute, (self, other), is_proportional(self)))

    def __divmod__(self, other: Any) -> Any:
        return (self // other, self % other) if isinstance(other, int) else divmod(int.__int__(self), other)


@dataclass(frozen=True)
class _Multiple:
    """The product of some sizes and a number."""

    number: int

    def __call__(self, *sizes: int) -> int:
        return self.number * math.prod(sizes)


def make_multiple(number: int, sizes: Sequence[int]) -> int:
    """Return a multiple of the product of some sizes, with those of them that have origins as its origin."""
    factors = tuple(size for size in sizes if isinstance(size, Size))
    if not factors or not number:
        return number
    compute = _Multiple(number // math.prod(map(strip_origin, factors)))
    size: Size = Size(number, FromExpression(compute, factors, len(factors) == 1, factors))
    return size


class Real(_Watched, float):
    """A float that was computed from sizes, such as `channels ** -0.5`."""

    origin: FromExpression

    def __int__(self) -> int:
        return float.__int__(self)

    def __floor__(self) -> Any:
        return self._round(math.floor)

    def __ceil__(self) -> Any:
        return self._round(math.ceil)

    def __trunc__(self) -> Any:
        return self._round(math.trunc)

    def __round__(self, digits: Any = None) -> Any:
        return self._round(round) if digits is None else derive(round, self, digits)

    def _round(self, function: Callable[[Any], int]) -> Any:
        return derive(function, self)

    def is_integer(self) -> bool:
        """Return whether it is a whole number."""
        note_check(float.is_integer, (self,))
        return float.is_integer(self)


class Ratio(Real):
    """A float that is a size by a number, such as `channels / 2`; rounded it is a size again."""

    is_length = True

    def __int__(self) -> int:
        note_ordinary(self._round(int))
        return float.__int__(self)

    def _round(self, function: Callable[[Any], int]) -> Size:
        origin = replace(self.origin, compute=_Rounded(function, self.origin.compute))
        size: Size = Size(function(strip_origin(self)), origin)
        return size


def negate(number: Number) -> Any:
    """Return the number by the other sign; the size itself if the number is one with a minus."""
    origin = number.origin
    if isinstance(origin, FromExpression) and origin.compute is operator.neg:
        return origin.inputs[0]
    return derive(operator.neg, number)


def _is_number(value: Any) -> bool:
    """Whether a value is a number of Python itself, or one that remembers sizes."""
    return type(value) in (int, float, bool) or isinstance(value, Number)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _make_length(compute: Callable[[Any, Any], Any], swap: bool) -> Callable[[Size, Any], Any]:
    """Return the method of `Size` for an operator whose result is a length; with `swap` for a `Size` on the right."""

    def method(self: Size, other: Any) -> Any:
        if not isinstance(other, int):
            if compute is operator.mul and type(other) is float:
                return self._share(compute, other)
            return _derive(compute, self, other, swap)
        value, number = int.__int__(self), int.__int__(other)
        a, b = (number, value) if swap else (value, number)
        inputs = (other, self) if swap else (self, other)
        operands = tuple(v for v in (self, other) if isinstance(v, Size))
        proportional = all(map(is_proportional, operands))
        multiplied = {operator.mul: operands, operator.floordiv: operands[:1]}.get(compute, ())
        factors = multiplied if len(operands) == 2 and all(map(find_factors, operands)) else ()
        if compute in (operator.add, operator.sub):
            proportional = proportional and (len(operands) == 2 or number == 0)  # what is added does not double
        else:
            proportional = proportional and len(operands) == 1 and not (swap and compute is operator.floordiv)
        both = len(operands) == 2 and not swap
        is_difference, is_quotient = both and compute is operator.sub, both and compute is operator.floordiv
        origin = FromExpression(compute, inputs, proportional, factors, is_difference, is_quotient)
        return Size(compute(a, b), origin)

    return method


def _derive(compute: Callable[[Any, Any], Any], number: Any, other: Any, swap: bool) -> Any:
    """Return what an operator computes from a number with an origin and another."""
    if _is_number(other):
        return derive(compute, *((other, number) if swap else (number, other)))
    ordinary = strip_origin(number)
    return compute(other, ordinary) if swap else compute(ordinary, other)


def _make_other(compute: Callable[[Any, Any], Any], swap: bool) -> Callable[[Any, Any], Any]:
    """Return the method of `Integer` and `Real` for one operator; its result is no length."""

    def method(self: Any, other: Any, *modulus: Any) -> Any:
        if modulus:  # of pow
            return derive(pow, self, other, *modulus)
        if not isinstance(other, int) and not _is_number(other):  # a tensor, or a float that keeps a path of its own
            return NotImplemented
        return _derive(compute, self, other, swap)

    return method


_LENGTHS = (operator.add, operator.sub, operator.mul, operator.floordiv)
_WITH_FLOATS = (*_LENGTHS, operator.mod, operator.pow)
_OF_INTEGERS = (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift)
for _kind, _make, _operators in (
    (Integer, _make_other, (*_WITH_FLOATS, *_OF_INTEGERS)),
    (Size, _make_length, _LENGTHS),
    (Real, _make_other, (*_WITH_FLOATS, operator.truediv)),
):
    for _compute in _operators:
        _name = _compute.__name__.strip("_")
        setattr(_kind, f"__{_name}__", _make(_compute, swap=False))
        setattr(_kind, f"__r{_name}__", _make(_compute, swap=True))
