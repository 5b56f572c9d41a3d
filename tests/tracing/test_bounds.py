"""What is known of questions about sizes without trying widths; sizes that differ stay different."""

import math
import operator

import numpy as np
import pytest
import torch
from torch import nn

from timm_autoslim import convert
from timm_autoslim.tracing.bounds import Bounds
from timm_autoslim.tracing.formulas import Count
from timm_autoslim.tracing.origins import FromDimension
from timm_autoslim.tracing.sizes import Size
from timm_autoslim.tracing.watching import Check, Lookup

IMAGE = torch.zeros(1, 3, 8, 8)


class Compared(nn.Module):
    """A network of two widths that compares sizes in its forward."""

    def __init__(self, compare, a=8, b=12):
        super().__init__()
        self.compare, self.other = compare, 8
        self.a, self.b, self.head = nn.Conv2d(3, a, 1), nn.Conv2d(a, b, 1), nn.Linear(b, 5)

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x).relu()
        return self.head((y if self.compare(self, x, y) else 2 * y).mean((2, 3)))


@pytest.mark.parametrize(
    ("compare", "sizes", "least"),
    [
        (lambda s, x, y: x.shape[1] == y.shape[1], (8, 12), (1, 9)),
        (lambda s, x, y: x.shape[1] != y.shape[1], (12, 8), (9, 1)),
        (lambda s, x, y: x.shape[1] < y.shape[1], (8, 12), (1, 9)),
        (lambda s, x, y: x.shape[1] >= y.shape[1], (8, 12), (1, 9)),
        (lambda s, x, y: s.a.out_channels > s.b.out_channels, (12, 8), (9, 1)),
        (lambda s, x, y: x.shape[1] - 1 == y.shape[1], (8, 12), (1, 8)),
        (lambda s, x, y: x.shape[1] == y.shape[1], (10, 12), (1, 12)),  # too few widths would be left: it is fixed
        (lambda s, x, y: x.shape[1] == y.shape[1] + x.shape[1], (8, 12), (1, 1)),
        (lambda s, x, y: x.shape[1] == 2 * x.shape[1], (8, 12), (1, 1)),
        (lambda s, x, y: s.other == y.shape[1], (8, 12), (1, 9)),
        (lambda s, x, y: s.other == x.shape[1] // 2, (8, 12), (1, 1)),
    ],
)
def test_the_larger_one_stays_larger(compare, sizes, least):
    supernet = convert(Compared(compare, *sizes), IMAGE).eval()
    space, images = supernet.space, torch.randn(2, *IMAGE.shape[1:])
    floors = dict(zip("ab", sizes, strict=True)) | dict(zip(space.names, supernet.graph.floors, strict=True))
    assert tuple(floors.values()) == least
    assert not supernet.repairs
    for widths in (space.min(), space.uniform(0.5), space.sample(torch.Generator().manual_seed(0))):
        assert torch.equal(supernet(images, widths), supernet.extract(widths).eval()(images))


# -- bounds ------------------------------------------------------------------------------------------------------------

A, B = (Size(value, FromDimension(np.arange(value))) for value in (12, 8))
BOUNDS = Bounds({id(A): Count(0, ((0, 3),)), id(B): Count(2, ((1, 1),))}, [(1, 4), (2, 6)])  # 3 to 12, and 4 to 8


@pytest.mark.parametrize(
    ("number", "low", "high"),
    [
        (A, 3, 12),
        (-A, -12, -3),
        (A + B, 7, 20),
        (A - B, -5, 8),
        (A - A, 0, 0),
        (2 * A + 1, 7, 25),
        (A // 3, 1, 4),
        (A % 3, 0, 0),
        (B % 3, 0, 2),
        (A * B, 12, 96),
        (A * B % 1, 0, 0),
        (A * 0.5 % 1, 0, 1),
        (A * B // 5, 2, 19),
        (A / B, 3 / 8, 3),
        (A * 0.5, 1.5, 6),
        (B**2, -math.inf, math.inf),
        (5, 5, 5),
    ],
)
def test_bounds_of_numbers(number, low, high):
    assert BOUNDS.find_bounds(number) == (low, high)


@pytest.mark.parametrize(
    ("compute", "inputs", "is_constant"),
    [
        (operator.eq, (A, 13), True),
        (operator.eq, (A, 12), False),
        (operator.eq, (A + 1, A + 1), True),
        (operator.ge, (A, 3), True),
        (operator.gt, (A, 3), False),
        (operator.le, (A, 12), True),
        (operator.lt, (A, 12), False),
        (operator.lt, (A, B), False),
        (operator.gt, (A * B, 11), True),
        (operator.eq, (A * B % 1, 0), True),
        (bool, (A,), True),
        (bool, (A % 3,), True),
        (bool, (B - 5,), False),
        (Lookup(frozenset({1, 2, 13})), (A,), True),
        (Lookup(frozenset({1, 9})), (A,), False),
        (max, (A, B), False),
    ],
)
def test_questions_that_bounds_answer(compute, inputs, is_constant):
    assert BOUNDS.is_constant(compute, inputs) is is_constant


class Checking(nn.Module):
    """Layers of several widths, each with many harmless checks."""

    def __init__(self, checks):
        super().__init__()
        self.checks = checks
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in ((3, 8), (8, 9), (9, 10), (10, 12)))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        for layer in self.layers:
            y = layer(x).relu()
            c, d = x.shape[1], y.shape[1]
            for _ in range(self.checks):
                if not (c > 0 and c * d > 0 and c + 2 * d < 10**6 and (c * d) % 1 == 0):
                    raise ValueError  # no assert: pytest's would lead the search for outer state through all of pytest
            x = y
        return self.head(x.mean((2, 3)))


def test_harmless_checks_take_no_tries(monkeypatch):
    """Each question is answered once, without a width that is tried."""
    monkeypatch.setattr(Check, "find_answer", lambda *args: pytest.fail("a width was tried"))
    assert len(convert(Checking(10), torch.zeros(1, 3, 4, 4)).space) == 4


def test_equal_questions_are_answered_once(monkeypatch):
    class Asking(Checking):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
                for _ in range(self.checks):
                    if x.shape[1] ** 2 < 4:
                        raise ValueError
            return self.head(x.mean((2, 3)))

    tries = []
    find_answer = Check.find_answer
    monkeypatch.setattr(Check, "find_answer", lambda check, get: tries.append(0) or find_answer(check, get))
    space = convert(Asking(10), torch.zeros(1, 3, 4, 4)).space
    assert [group.floor for group in space.groups] == [2, 2, 2, 2]
    assert len(tries) <= 2 * (8 + 9 + 10 + 12)  # convert may trace twice
