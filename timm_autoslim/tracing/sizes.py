"""Integers with an origin: a module's attribute, the length of a dimension, or arithmetic with both."""

from __future__ import annotations

import contextlib
import dis
import operator
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

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
    """An int with an origin. Integer arithmetic with it gives another `Size`; anything else treats it as an int.

    Attributes:
        origin: where it comes from.
        is_guess: the code passed an ordinary integer, which it may have made of this size.
    """

    origin: FromAttribute | FromDimension | FromExpression
    is_guess = False

    def __new__(cls, value: int, origin: FromAttribute | FromDimension | FromExpression) -> Size:
        """Return `value` with this origin."""
        size = super().__new__(cls, value)
        size.origin = origin
        return size

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return (int, (int(self),))

    def __int__(self) -> int:
        _note_plain(self)
        return int.__int__(self)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Size):
            _note_comparison(self, other)
        return int.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        if isinstance(other, Size):
            _note_comparison(self, other)
        return int.__ne__(self, other)

    __hash__ = int.__hash__


class Ratio(float):
    """A float that is a size by a number, such as `channels / 2`; rounded it is a size again."""

    origin: FromExpression

    def __new__(cls, value: float, origin: FromExpression) -> Ratio:
        """Return `value` with this origin."""
        ratio = super().__new__(cls, value)
        ratio.origin = origin
        return ratio

    def __deepcopy__(self, memo: dict[int, Any]) -> float:
        return float(self)

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return (float, (float(self),))

    def __int__(self) -> int:
        value = float.__int__(self)
        _note_plain(Size(value, self.origin))
        return value

    def __floor__(self) -> int:
        return Size(float.__floor__(self), self.origin)

    def __ceil__(self) -> int:
        return Size(float.__ceil__(self), self.origin)

    def __round__(self, digits: Any = None) -> Any:
        return Size(float.__round__(self), self.origin) if digits is None else float.__round__(self, digits)


# -- what the model's code does with sizes ----------------------------------------------------------------------------


class Watcher(Protocol):
    """It learns what the model's code does with sizes, beside arithmetic."""

    def note_equal(self, a: Size, b: Size) -> None:
        """The code has compared two sizes, and they are equal."""

    def note_unequal(self, a: Size, b: Size) -> None:
        """The code has compared two sizes, and they are not equal."""

    def note_plain(self, size: Size) -> None:
        """The code has made an ordinary integer of a size, as by `int(x.shape[1])`."""


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher of sizes", default=None)
_COMPARE = dis.opmap["COMPARE_OP"]


@contextlib.contextmanager
def watching_sizes(watcher: Watcher) -> Iterator[None]:
    """Let `watcher` learn what the code in the block does with sizes."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def _note_comparison(a: Size, b: Size) -> None:
    watcher = _WATCHER.get()
    if watcher is None:
        return
    frame = sys._getframe(2)
    # keys of a dict are compared too, but not by this instruction
    if _is_of_model(frame) and frame.f_code.co_code[frame.f_lasti] == _COMPARE:
        equal = int.__eq__(a, b)
        (watcher.note_equal if equal else watcher.note_unequal)(a, b)


def _note_plain(size: Size) -> None:
    watcher = _WATCHER.get()
    if watcher is not None and _is_of_model(sys._getframe(2)):
        watcher.note_plain(size)


def _is_of_model(frame: Any) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name == "torch.nn.modules.rnn" or not name.startswith(("timm_autoslim.", "torch."))


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
        value = int.__int__(self)
        if not isinstance(other, int):
            return compute(other, value) if swap else compute(value, other)
        number = int.__int__(other)
        a, b = (number, value) if swap else (value, number)
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
        return Size(compute(a, b), FromExpression(operands, proportional, factors, is_difference, is_quotient))

    return method


def _divide(self: Size, other: Any) -> Any:
    result = int.__int__(self) / other
    quotient = self // other if isinstance(other, int) else None
    if type(result) is not float or (quotient is None and type(other) is not float):
        return result
    origin = quotient.origin if isinstance(quotient, Size) else FromExpression((self,), is_proportional(self))
    return Ratio(result, origin if isinstance(origin, FromExpression) else FromExpression((self,), True))


Size.__truediv__ = _divide  # type: ignore[method-assign, assignment]


def _make_comparison(name: str) -> Callable[[Size, int], bool]:
    """Return the method of `Size` for one comparison of order."""
    compare = getattr(int, name)

    def method(self: Size, other: int) -> bool:
        if isinstance(other, Size):
            _note_comparison(self, other)
        return bool(compare(self, other))

    return method


for _name in ("__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Size, _name, _make_comparison(_name))
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


def wrap_attributes(model: nn.Module, shared: Set[int] = frozenset()) -> None:
    """Give every integer attribute of every module, also in tuples and lists, its path as the origin.

    So do those of objects and dicts that modules hold, such as configurations. One that several modules hold has the
    path of the first.

    Args:
        model: a meta copy.
        shared: ids of objects that are not the copy's own, and stay as they are.
    """
    ids = set(shared)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in list(module.__dict__.items()):
            if name.startswith("_"):
                continue
            module.__dict__[name] = _wrap_integers(value, prefix + name)
            members = _find_members(name, value)
            if members is not None and id(value) not in ids:
                ids.add(id(value))
                for key, member in list(members.items()):
                    if isinstance(key, str) and key.isidentifier():
                        members[key] = _wrap_integers(member, f"{prefix}{name}.{key}")


def _find_members(name: str, value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, or the dict, if it may be a configuration."""
    if type(value) is dict:
        return value
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value) or package in ("torch", "timm", "builtins"):
        return None
    members = getattr(value, "__dict__", None)
    return members if type(members) is dict else None
