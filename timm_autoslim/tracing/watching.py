"""What a model's code does with sizes beside arithmetic: it compares them, looks them up, makes integers of them."""

from __future__ import annotations

import contextlib
import dis
import operator
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from timm_autoslim.tracing.origins import FromExpression, Number, evaluate, get_plain
from timm_autoslim.tracing.source import find_tables, format_line


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

    def find_answer(self, get_value: Callable[[Number], int]) -> Any:
        """Return the answer if attributes and dimensions have these values; an exception's class if it raises."""
        try:
            return self.compute(*(evaluate(number, get_value) for number in self.inputs))
        except (ArithmeticError, ValueError) as error:
            return type(error)


class Watcher(Protocol):
    """It learns what the model's code does with sizes, beside arithmetic."""

    def note_equal(self, a: Number, b: Number) -> None:
        """The code has compared two sizes, and they are equal."""

    def note_unequal(self, a: Number, b: Number) -> None:
        """The code has compared two sizes, and they are not equal."""

    def note_check(self, check: Check) -> None:
        """The code has asked something else about sizes, such as `channels % 8 == 0`."""

    def note_plain(self, size: Number) -> None:
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


def note_comparison(compute: Callable[..., bool], a: Any, b: Any) -> None:
    """Tell the watcher that the code which runs the caller has compared `a` with `b`."""
    watcher = _WATCHER.get()
    if watcher is None:
        return
    frame = sys._getframe(2)
    if not _is_of_model(frame):
        return
    code = frame.f_code.co_code[frame.f_lasti]
    equality = compute in (operator.eq, operator.ne)
    pair = _find_pair(a, b) if equality or _is_size(b) else None
    if pair is not None and code == _COMPARE:
        equal = get_plain(pair[0]) == get_plain(pair[1])
        (watcher.note_equal if equal else watcher.note_unequal)(*pair)
    elif pair is None or not equality or (code == _CONTAINS and not find_tables(frame)):  # no key of a dict
        watcher.note_check(Check(compute, (a, b), _locate(frame)))


def _is_size(number: Any) -> bool:
    return isinstance(number, Number) and number.is_length and isinstance(number, int)


def _find_pair(a: Any, b: Any) -> tuple[Any, Any] | None:
    """Return the two sizes that are compared, themselves or by their difference and 0; None if there are none."""
    if _is_size(a) and _is_size(b):
        return a, b
    origin = a.origin
    if isinstance(origin, FromExpression) and origin.is_difference and type(b) is int and b == 0:
        return origin.inputs[0], origin.inputs[1]
    return None


def note_truth(number: Any) -> None:
    """Tell the watcher that the code which runs the caller has asked whether a number is not 0."""
    watcher = _WATCHER.get()
    if watcher is None or not _is_of_model(frame := sys._getframe(2)):
        return
    pair = _find_pair(number, 0)
    if pair is None:
        watcher.note_check(Check(bool, (number,), _locate(frame)))
    else:
        (watcher.note_unequal if get_plain(number) else watcher.note_equal)(*pair)


def note_lookup(number: Any) -> None:
    """Tell the watcher of the dicts and sets where the code which runs the caller looks a number up."""
    watcher = _WATCHER.get()
    if watcher is not None and _is_of_model(frame := sys._getframe(2)):
        for keys in find_tables(frame):
            plain = frozenset(key for key in keys if type(key) is int)
            if plain:
                answer = _make_lookup(plain)
                watcher.note_check(Check(answer, (number,), _locate(frame)))


def _make_lookup(keys: frozenset[int]) -> Callable[[int], int | None]:
    return lambda value: value if value in keys else None


def note_plain(size: Number) -> None:
    """Tell the watcher that the code which runs the caller makes an ordinary integer of a size."""
    watcher = _WATCHER.get()
    if watcher is not None and _is_of_model(sys._getframe(2)):
        watcher.note_plain(size)


def _is_of_model(frame: Any) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name == "torch.nn.modules.rnn" or not name.startswith(("timm_autoslim.", "torch."))


def _locate(frame: Any) -> str:
    return format_line(frame.f_code.co_filename, frame.f_lineno)
