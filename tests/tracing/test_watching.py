"""What the watcher learns of the comparisons, lookups and conversions of sizes."""

import inspect
import math

import numpy as np
import pytest

from timm_autoslim.tracing.origins import FromAttribute
from timm_autoslim.tracing.sizes import Size
from timm_autoslim.tracing.watching import watching_sizes

A, B, TWIN = (Size(value, FromAttribute(path)) for value, path in ((8, "a"), (6, "b"), (8, "twin")))

TABLE = {8: "wide", "x": 0}


class Notes:
    """Keeps what it is told."""

    def __init__(self):
        self.equal, self.checks, self.ordinary = [], [], []

    def note_equal(self, a, b):
        self.equal.append((a.origin.path, b.origin.path))

    def note_check(self, check):
        self.checks.append(check)

    def note_ordinary(self, size):
        self.ordinary.append(size)


def watch(function):
    notes = Notes()
    with watching_sizes(notes):
        function()
    return notes


@pytest.mark.parametrize(
    "function", [lambda: A == TWIN, lambda: A != TWIN, lambda: A - TWIN == 0, lambda: not A - TWIN]
)
def test_two_sizes_that_are_equal(function):
    notes = watch(function)
    assert notes.equal == [("a", "twin")]
    (check,) = notes.checks  # beside that, the answer must stay
    assert {check.find_answer(lambda size: 8), check.find_answer(lambda size: size is TWIN)} == {False, True}


@pytest.mark.parametrize("function", [lambda: A == B, lambda: A > B, lambda: A - B == 0, lambda: bool(A - B)])
def test_two_sizes_that_differ(function):
    notes = watch(function)
    assert notes.equal == []
    assert len(notes.checks) == 1


@pytest.mark.parametrize(
    ("function", "answers"),
    [
        (lambda: A >= 4, [False, True]),
        (lambda: A % 4 == 0, [False, True]),
        (lambda: A in (4, 8), [False, True]),
        (lambda: A // 2 == 4, [False, True]),
        (lambda: 1 if A % 3 else 0, [False, True]),
        (lambda: (A / 4).is_integer(), [False, True]),
        (lambda: A * 0.5 > 3, [False, True]),
        (lambda: A**0.5 > 2, [False, True]),
        (lambda: 1 / A < 0.2, [False, True]),
        (lambda: np.sqrt(A) > 2, [False, True]),
        (lambda: np.greater(A, 5), [False, True]),
        (lambda: A.bit_length() == 4, [False, True]),
    ],
)
def test_any_other_question_is_a_check_with_its_line(function, answers):
    notes = watch(function)
    assert notes.equal == []
    check = notes.checks[-1]
    assert [check.find_answer(lambda size, value=value: value) for value in (3, 8)] == answers
    assert check.reason.endswith(f"test_watching.py:{inspect.getsourcelines(function)[1]}")


@pytest.mark.parametrize(
    "function",
    [lambda: {A, B}, lambda: {A: 1, B: 1}, lambda: {n for n in (A, B)}, lambda: dict.fromkeys((A, B))],  # noqa: C416
)
def test_the_members_of_a_set_stay_different(function):
    (check,) = watch(function).checks
    assert [check.find_answer(lambda size, n=n: n if size is A else 6) for n in (6, 7)] == [True, False]


def test_a_lookup_is_a_check_of_the_key():
    answers = [[check.find_answer(lambda size, n=n: n) for n in (3, 8)] for check in watch(lambda: TABLE[A]).checks]
    assert [None, 8] in answers


def test_a_check_that_raises_answers_with_the_exception():
    (check,) = watch(lambda: 16 // (A - 4) == 4).checks
    assert check.find_answer(lambda size: 4) is ZeroDivisionError


def test_ordinary_integers_of_sizes():
    assert watch(lambda: (int(A), math.floor(A / 2), int(A / 2))).ordinary == [8, 4]
    assert watch(lambda: A % 3 + 1).ordinary == []


def test_nothing_is_noted_without_a_watcher():
    notes = watch(lambda: None)
    assert A == TWIN
    assert int(A) == 8
    assert (notes.equal, notes.ordinary) == ([], [])
