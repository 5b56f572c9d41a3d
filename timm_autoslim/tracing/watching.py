"""What a model's code does with sizes beside arithmetic: it compares them, looks them up, makes integers of them."""

from __future__ import annotations

import contextlib
import dis
import operator
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, Protocol

import torch

from timm_autoslim.tracing.origins import FromExpression, Number, evaluate, strip_origin
from timm_autoslim.tracing.source import find_tables, format_line, has_lookup


@dataclass(frozen=True, eq=False)
class Check:
    """A question about sizes that the model's code asked.

    Attributes:
        compute: the function that answers it.
        inputs: what it gets: numbers with and without an origin.
        reason: why the answer must stay, such as the file and the line.
        consequence: what follows where it does not.
    """

    compute: Callable[..., Any]
    inputs: tuple[Any, ...]
    reason: str
    consequence: str = ", and takes another path if it is smaller"

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

    def note_check(self, check: Check) -> None:
        """The code has asked something about sizes, such as `channels % 8 == 0`."""

    def note_ordinary(self, size: Number) -> None:
        """The code has made an ordinary number of a size, as by `int(x.shape[1])`."""

    def note_gradients(self) -> None:
        """The code has asked whether gradients are enabled."""


class Members:
    """The numbers that one run of a function puts into a set or dict at one place."""

    def __init__(self) -> None:
        self._place: tuple[Any, int] | None = None
        self._numbers: list[Number] = []

    def add(self, frame: Any, number: Number) -> list[Number]:
        """Add a number; return the others that stand there."""
        place = frame, frame.f_lasti
        if place != self._place:
            self._place, self._numbers = place, []
        others = [other for other in self._numbers if other is not number]
        self._numbers.append(number)
        return others


_WATCHER: ContextVar[tuple[Watcher, Members] | None] = ContextVar("watcher of sizes", default=None)
_CALLERS = ("timm_autoslim.tracing.sizes", "timm_autoslim.tracing.functions")  # the code that calls this one
_COMPARE = dis.opmap["COMPARE_OP"]
_DISPLAY_NAMES = ("BUILD_SET", "BUILD_MAP", "BUILD_CONST_KEY_MAP", "SET_ADD", "MAP_ADD", "SET_UPDATE", "DICT_UPDATE")
_DISPLAYS = frozenset(dis.opmap[name] for name in _DISPLAY_NAMES if name in dis.opmap)


_NO_USE = None, None, None
_is_grad_enabled = torch.is_grad_enabled  # of torch itself, whatever takes its place in a run


@contextlib.contextmanager
def watching_sizes(watcher: Watcher) -> Iterator[None]:
    """Let `watcher` learn what the code in the block does with sizes."""
    token = _WATCHER.set((watcher, Members()))
    try:
        yield
    finally:
        _WATCHER.reset(token)


def note_comparison(compute: Callable[..., bool], a: Any, b: Any) -> None:
    """Tell the watcher that the model's code has compared `a` with `b`."""
    watcher, frame, _ = _find_use()
    if watcher is None:
        return
    code = _read_code(frame.f_code)[frame.f_lasti]
    equality = compute in (operator.eq, operator.ne)
    pair = _find_pair(a, b) if equality or _is_size(b) else None
    if pair is not None and code == _COMPARE and strip_origin(pair[0]) == strip_origin(pair[1]):
        watcher.note_equal(*pair)
    if pair is None or not equality or code == _COMPARE or not find_tables(frame):  # no key of a dict
        watcher.note_check(_ask(compute, (a, b), frame))


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
    """Tell the watcher that the model's code has asked whether a number is not 0."""
    watcher, frame, _ = _find_use()
    if watcher is None:
        return
    pair = _find_pair(number, 0)
    if pair is not None and not strip_origin(number):
        watcher.note_equal(*pair)
    watcher.note_check(_ask(bool, (number,), frame))


def note_check(compute: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    """Tell the watcher that the model's code has asked a question about numbers."""
    watcher, frame, _ = _find_use()
    if watcher is not None:
        watcher.note_check(_ask(compute, inputs, frame))


def note_lookup(number: Any) -> None:
    """Tell the watcher of what the model's code looks a number up in, or of the others in a set that it makes."""
    watcher, frame, members = _find_use()
    if watcher is None:
        return
    for keys in find_tables(frame):
        ordinary = frozenset(key for key in keys if type(key) is int)
        if ordinary:
            watcher.note_check(_ask(Lookup(ordinary), (number,), frame))
    if _read_code(frame.f_code)[frame.f_lasti] in _DISPLAYS or not has_lookup(frame):
        for other in members.add(frame, number):
            watcher.note_check(_ask(operator.eq, (other, number), frame))


@dataclass(frozen=True)
class Lookup:
    """What is found under a number, as far as the keys decide it: the key."""

    keys: frozenset[int]

    def __call__(self, value: int) -> int | None:
        """Return the key that a number is, or None."""
        return value if value in self.keys else None


def note_gradients() -> None:
    """Tell the watcher that the model's code has asked whether gradients are enabled."""
    watcher = _WATCHER.get()
    if watcher is not None:
        watcher[0].note_gradients()


def is_grad_enabled() -> bool:
    """Return whether gradients are enabled; the watcher learns that the model's code asks."""
    if is_of_model(sys._getframe(1)):
        note_gradients()
    return _is_grad_enabled()


def note_ordinary(size: Number) -> None:
    """Tell the watcher that the model's code makes an ordinary number of a size."""
    watcher, _, _ = _find_use()
    if watcher is not None:
        watcher.note_ordinary(size)


def _find_use() -> Any:
    """Return the watcher, the frame of the code that uses a number, and the set that it makes.

    Without a watcher, and where that code is not the model's, these are None.
    """
    watcher = _WATCHER.get()
    if watcher is None:
        return _NO_USE
    frame: Any = sys._getframe(2)
    while frame.f_globals.get("__name__") in _CALLERS:
        frame = frame.f_back
    return (watcher[0], frame, watcher[1]) if is_of_model(frame) else _NO_USE


@lru_cache(4096)
def _read_code(code: CodeType) -> bytes:
    return code.co_code


def is_of_model(frame: Any) -> bool:
    """Whether a frame runs the model's code, not torch's or that of this package."""
    name: str = frame.f_globals.get("__name__", "")
    return name == "torch.nn.modules.rnn" or not name.startswith(("timm_autoslim.", "torch."))


def _ask(compute: Callable[..., Any], inputs: tuple[Any, ...], frame: Any) -> Check:
    line = format_line(frame.f_code.co_filename, frame.f_lineno)
    return Check(compute, inputs, f"the code asks about their number at {line}")
