"""Integers and floats that remember where they come from, through arithmetic."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm_autoslim.tracing.origins import FromExpression, Number, Origin, find_factors, get_plain, is_proportional
from timm_autoslim.tracing.watching import note_comparison, note_lookup, note_plain, note_truth


def _make_comparison(compute: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    """Return the method for one comparison."""

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        note_comparison(compute, self, other)
        return compute(get_plain(self), get_plain(other))

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
        return bool(get_plain(self))

    def __hash__(self) -> int:
        note_lookup(self)
        return hash(get_plain(self))


class Integer(_Watched, int):
    """An integer that was computed from sizes; itself it is no length: a remainder, a power, a negative."""

    origin: Origin

    def __neg__(self) -> Integer:
        return Integer(-get_plain(self), FromExpression(operator.neg, (self,)))  # type: ignore[no-any-return]

    def __abs__(self) -> Integer:
        return Integer(abs(get_plain(self)), FromExpression(operator.abs, (self,)))  # type: ignore[no-any-return]


class Size(Integer):
    """A length with an origin. Sums, products and quotients of it are sizes again.

    Attributes:
        is_guess: the code passed an ordinary integer, which it may have made of this size.
    """

    is_length = True
    is_guess = False

    def __int__(self) -> int:
        note_plain(self)
        return int.__int__(self)

    def __truediv__(self, other: Any) -> Any:
        result = int.__int__(self) / other
        if isinstance(other, int):
            quotient: Any = self // other
            return Ratio(result, replace(quotient.origin, compute=operator.truediv))
        if type(other) is not float or type(result) is not float:
            return result
        return Ratio(result, FromExpression(operator.truediv, (self, other), is_proportional(self)))

    def __divmod__(self, other: Any) -> Any:
        return (self // other, self % other) if isinstance(other, int) else divmod(int.__int__(self), other)


class Ratio(_Watched, float):
    """A float that is a size by a number, such as `channels / 2`; rounded it is a size again."""

    origin: FromExpression
    is_length = True

    def __int__(self) -> int:
        note_plain(self._round(int))
        return float.__int__(self)

    def __floor__(self) -> int:
        return self._round(math.floor)

    def __ceil__(self) -> int:
        return self._round(math.ceil)

    def __round__(self, digits: Any = None) -> Any:
        return self._round(round) if digits is None else float.__round__(self, digits)

    def _round(self, function: Callable[[float], int]) -> Size:
        divide = self.origin.compute
        origin = replace(self.origin, compute=lambda *values: function(divide(*values)))
        size: Size = Size(function(get_plain(self)), origin)
        return size


# -- arithmetic with integers ------------------------------------------------------------------------------------------


def _make_length(compute: Callable[[Any, Any], Any], swap: bool) -> Callable[[Size, Any], Any]:
    """Return the method of `Size` for an operator whose result is a length; with `swap` for a `Size` on the right."""

    def method(self: Size, other: Any) -> Any:
        value = int.__int__(self)
        if not isinstance(other, int):
            return compute(other, value) if swap else compute(value, other)
        number = int.__int__(other)
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


def _make_other(compute: Callable[[Any, Any], Any], swap: bool) -> Callable[[Any, Any], Any]:
    """Return the method of `Integer` for one operator; its result is no length."""

    def method(self: Any, other: Any, *modulus: Any) -> Any:
        if modulus:  # of pow
            return pow(get_plain(self), get_plain(other), *map(get_plain, modulus))
        if not isinstance(other, int):
            return compute(other, get_plain(self)) if swap else compute(get_plain(self), other)
        inputs = (other, self) if swap else (self, other)
        result = compute(*map(get_plain, inputs))
        return Integer(result, FromExpression(compute, inputs)) if isinstance(result, int) else result

    return method


_LENGTHS = (operator.add, operator.sub, operator.mul, operator.floordiv)
_OTHERS = (operator.mod, operator.pow, operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift)
for _kind, _make, _operators in ((Integer, _make_other, (*_LENGTHS, *_OTHERS)), (Size, _make_length, _LENGTHS)):
    for _compute in _operators:
        _name = _compute.__name__.strip("_")
        setattr(_kind, f"__{_name}__", _make(_compute, swap=False))
        setattr(_kind, f"__r{_name}__", _make(_compute, swap=True))
