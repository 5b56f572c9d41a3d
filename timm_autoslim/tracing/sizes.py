"""Numbers with an origin: a module's attribute, the length of a dimension, or arithmetic with both."""

from __future__ import annotations

import contextlib
import dis
import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

from timm_autoslim.tracing.labels import Vector
from timm_autoslim.tracing.source import find_tables, format_line


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
    factors: tuple[Size, ...] = ()
    is_difference: bool = False
    is_quotient: bool = False

    @property
    def operands(self) -> tuple[Size | Ratio, ...]:
        """The inputs that are lengths, or shares of them."""
        return tuple(value for value in self.inputs if isinstance(value, (Size, Ratio)))


Origin = FromAttribute | FromDimension | FromExpression


class _WithOrigin:
    """A number that remembers where it comes from. Copies and pickles are ordinary numbers.

    Attributes:
        origin: where it comes from.
    """

    origin: Any

    def __new__(cls, value: Any, origin: Origin) -> Any:
        """Return `value` with this origin."""
        number = super().__new__(cls, value)  # type: ignore[call-arg]
        number.origin = origin
        return number

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return get_plain(self)

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        value = get_plain(self)
        return type(value), (value,)


class Size(_WithOrigin, int):
    """A length with an origin. Sums, products and quotients of it are sizes again.

    Attributes:
        is_guess: the code passed an ordinary integer, which it may have made of this size.
    """

    origin: Origin
    is_guess = False

    def __int__(self) -> int:
        _note_plain(self)
        return int.__int__(self)


class Remainder(_WithOrigin, int):
    """An integer that was computed from sizes, and is no length itself: a remainder, a power, a negative."""

    origin: FromExpression


class Ratio(_WithOrigin, float):
    """A float that is a size by a number, such as `channels / 2`; rounded it is a size again."""

    origin: FromExpression

    def __int__(self) -> int:
        _note_plain(self._round(int))
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


def get_plain(number: Any) -> Any:
    """Return a number without its origin."""
    return int.__int__(number) if isinstance(number, int) else float.__float__(number)


# -- what the model's code does with sizes ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Check:
    """A question about sizes that the model's code asked.

    Attributes:
        compute: the function that answers it.
        inputs: what it gets: numbers with and without an origin.
        where: the file and the line.
    """

    compute: Callable[..., Any]
    inputs: tuple[Any, ...]
    where: str

    def find_answer(self, get_value: Callable[[Size], int]) -> Any:
        """Return the answer if attributes and dimensions have these values; an exception's class if it raises."""
        try:
            return self.compute(*(evaluate(number, get_value) for number in self.inputs))
        except (ArithmeticError, ValueError) as error:
            return type(error)


class Watcher(Protocol):
    """It learns what the model's code does with sizes, beside arithmetic."""

    def note_equal(self, a: Size, b: Size) -> None:
        """The code has compared two sizes, and they are equal."""

    def note_unequal(self, a: Size, b: Size) -> None:
        """The code has compared two sizes, and they are not equal."""

    def note_check(self, check: Check) -> None:
        """The code has asked something else about sizes, such as `channels % 8 == 0`."""

    def note_plain(self, size: Size) -> None:
        """The code has made an ordinary integer of a size, as by `int(x.shape[1])`."""


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher of sizes", default=None)
_COMPARE, _CONTAINS = dis.opmap["COMPARE_OP"], dis.opmap["CONTAINS_OP"]


@contextlib.contextmanager
def watching_sizes(watcher: Watcher) -> Iterator[None]:
    """Let `watcher` learn what the code in the block does with sizes."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def _note_comparison(compute: Callable[..., bool], a: Any, b: Any) -> None:
    watcher = _WATCHER.get()
    if watcher is None:
        return
    frame = sys._getframe(2)
    if not _is_of_model(frame):
        return
    code = frame.f_code.co_code[frame.f_lasti]
    equality = compute in (operator.eq, operator.ne)
    pair = _find_pair(a, b) if equality or isinstance(b, Size) else None
    if pair is not None and code == _COMPARE:
        equal = get_plain(pair[0]) == get_plain(pair[1])
        (watcher.note_equal if equal else watcher.note_unequal)(*pair)
    elif pair is None or not equality or (code == _CONTAINS and not find_tables(frame)):  # no key of a dict
        watcher.note_check(Check(compute, (a, b), _locate(frame)))


def _find_pair(a: Any, b: Any) -> tuple[Any, Any] | None:
    """Return the two sizes that are compared, themselves or by their difference and 0; None if there are none."""
    if isinstance(a, Size) and isinstance(b, Size):
        return a, b
    origin = a.origin
    if isinstance(origin, FromExpression) and origin.is_difference and type(b) is int and b == 0:
        return origin.inputs[0], origin.inputs[1]
    return None


def _note_truth(number: Any) -> None:
    watcher = _WATCHER.get()
    if watcher is None or not _is_of_model(frame := sys._getframe(2)):
        return
    pair = _find_pair(number, 0)
    if pair is None:
        watcher.note_check(Check(bool, (number,), _locate(frame)))
    else:
        (watcher.note_unequal if get_plain(number) else watcher.note_equal)(*pair)


def _note_lookup(number: Any) -> None:
    watcher = _WATCHER.get()
    if watcher is not None and _is_of_model(frame := sys._getframe(2)):
        for keys in find_tables(frame):
            plain = frozenset(key for key in keys if type(key) is int)
            if plain:
                answer = _make_lookup(plain)
                watcher.note_check(Check(answer, (number,), _locate(frame)))


def _make_lookup(keys: frozenset[int]) -> Callable[[int], int | None]:
    return lambda value: value if value in keys else None


def _note_plain(size: Size) -> None:
    watcher = _WATCHER.get()
    if watcher is not None and _is_of_model(sys._getframe(2)):
        watcher.note_plain(size)


def _is_of_model(frame: Any) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name == "torch.nn.modules.rnn" or not name.startswith(("timm_autoslim.", "torch."))


def _locate(frame: Any) -> str:
    return format_line(frame.f_code.co_filename, frame.f_lineno)


def evaluate(number: Any, get_value: Callable[[Size], int]) -> Any:
    """Return what a number would be if attributes and dimensions had these values."""
    if not isinstance(number, _WithOrigin):
        return number
    origin = number.origin
    if not isinstance(origin, FromExpression):
        assert isinstance(number, Size)
        return get_value(number)
    return origin.compute(*(evaluate(value, get_value) for value in origin.inputs))


def list_leaves(numbers: tuple[Any, ...]) -> Iterator[Size]:
    """Yield the attributes and dimensions that decide any of these numbers."""
    for number in numbers:
        if isinstance(number, _WithOrigin) and isinstance(number.origin, FromExpression):
            yield from list_leaves(number.origin.inputs)
        elif isinstance(number, Size):
            yield number


def is_proportional(size: Size | Ratio) -> bool:
    """Whether `size` doubles if every attribute and dimension that it was computed from doubles."""
    return not isinstance(size.origin, FromExpression) or size.origin.proportional


def find_leaves(size: Size | Ratio) -> Iterator[Size]:
    """Yield the attributes and dimensions that `size` was computed from as a length."""
    if isinstance(size.origin, FromExpression):
        for operand in size.origin.operands:
            yield from find_leaves(operand)
    else:
        assert isinstance(size, Size)
        yield size


def find_factors(size: Size | Ratio) -> tuple[Size, ...]:
    """Return the attributes and dimensions of which any one doubles `size` if it doubles and the others stay."""
    if not isinstance(size.origin, FromExpression):
        assert isinstance(size, Size)
        return (size,)
    if size.origin.proportional and len(size.origin.operands) == 1:
        return find_factors(size.origin.operands[0])
    return tuple(leaf for factor in size.origin.factors for leaf in find_factors(factor))


def find_quotient(size: Size) -> tuple[Size | Ratio, ...] | None:
    """Return a and b if `size` is a // b, and each is proportional to one attribute or dimension; else None."""
    if not isinstance(size.origin, FromExpression) or not size.origin.is_quotient:
        return None
    operands = size.origin.operands
    return operands if all(is_proportional(v) and len(list(find_leaves(v))) == 1 for v in operands) else None


# -- arithmetic -----------------------------------------------------------------------------------------------------


def _make_method(compute: Callable[[Any, Any], Any], swap: bool) -> Callable[[Size, Any], Any]:
    """Return the method of `Size` for one operator of Python; with `swap` the one for a `Size` on the right."""

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


def _make_remainder(compute: Callable[[Any, Any], Any], swap: bool) -> Callable[[Any, Any], Any]:
    """Return the method for an operator whose result is no length."""

    def method(self: Any, other: Any) -> Any:
        if isinstance(self, Remainder) and isinstance(other, Size) and compute in _LENGTHS:
            return NotImplemented  # that of `Size`
        if not isinstance(other, int):
            return compute(other, get_plain(self)) if swap else compute(get_plain(self), other)
        inputs = (other, self) if swap else (self, other)
        result = compute(*map(get_plain, inputs))
        return Remainder(result, FromExpression(compute, inputs)) if isinstance(result, int) else result

    return method


def _make_sign(compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: Remainder(compute(get_plain(self)), FromExpression(compute, (self,)))


def _divide(self: Size, other: Any) -> Any:
    result = int.__int__(self) / other
    if isinstance(other, int):
        quotient: Any = self // other
        return Ratio(result, replace(quotient.origin, compute=operator.truediv))
    if type(other) is not float or type(result) is not float:
        return result
    return Ratio(result, FromExpression(operator.truediv, (self, other), is_proportional(self)))


def _divmod(self: Size, other: Any) -> Any:
    return (self // other, self % other) if isinstance(other, int) else divmod(int.__int__(self), other)


def _make_comparison(compute: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    """Return the method for one comparison."""

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        _note_comparison(compute, self, other)
        return compute(get_plain(self), get_plain(other))

    return method


def _test(self: Any) -> bool:
    _note_truth(self)
    return bool(get_plain(self))


def _hash(self: Any) -> int:
    _note_lookup(self)
    return hash(get_plain(self))


_LENGTHS = (operator.add, operator.sub, operator.mul, operator.floordiv)
_OTHERS = (operator.mod, operator.pow, operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift)
for _compute in (*_LENGTHS, *_OTHERS):
    for _kind in (Size, Remainder):
        _make = _make_method if _kind is Size and _compute in _LENGTHS else _make_remainder
        _name = _compute.__name__.strip("_")
        setattr(_kind, f"__{_name}__", _make(_compute, swap=False))
        setattr(_kind, f"__r{_name}__", _make(_compute, swap=True))
for _kind in (Size, Remainder, Ratio):
    for _compute in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
        setattr(_kind, f"__{_compute.__name__}__", _make_comparison(_compute))
    for _sign in (operator.neg, operator.abs) if _kind is not Ratio else ():
        setattr(_kind, f"__{_sign.__name__.strip('_')}__", _make_sign(_sign))
    _kind.__bool__, _kind.__hash__ = _test, _hash  # type: ignore[method-assign]
Size.__truediv__, Size.__divmod__ = _divide, _divmod  # type: ignore[method-assign, assignment]
