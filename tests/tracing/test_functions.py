"""Functions of math on numbers that remember where they come from."""

import math

import pytest
import torch
from torch import nn

from timm_autoslim import convert
from timm_autoslim.tracing.functions import MATH
from timm_autoslim.tracing.origins import FromAttribute, evaluate
from timm_autoslim.tracing.sizes import Integer, Real, Size

A = Size(8, FromAttribute("a"))


@pytest.mark.parametrize(
    ("function", "args", "kind", "later"),
    [
        (math.sqrt, (A,), Real, 4.0),
        (math.log, (A, 2), Real, 4.0),
        (math.gcd, (12, A), Integer, 4),
        (math.isqrt, (A,), Integer, 4),
        (math.fsum, ([A, 1.5],), Real, 17.5),
        (math.hypot, (A, 12), Real, 20.0),
    ],
)
def test_results_remember_the_sizes(function, args, kind, later):
    result = MATH[function](*args)
    assert type(result) is kind
    assert float(result) == function(*args)
    assert evaluate(result, lambda size: 16) == later


def test_ordinary_numbers_stay():
    assert (type(MATH[math.sqrt](4)), MATH[math.isclose](1, 2, abs_tol=3), MATH[math.fsum]([1])) == (float, True, 1.0)
    with pytest.raises(ValueError, match="math domain error"):
        MATH[math.sqrt](-1)


def test_convert_puts_the_functions_back():
    class Rooted(nn.Linear):
        def forward(self, x):
            if (
                math.sqrt not in MATH.values()
            ):  # no assert: pytest's would lead the search for outer state through pytest
                raise RuntimeError
            return super().forward(x) / math.sqrt(x.shape[1])

    before = dict(vars(math))
    convert(nn.Sequential(nn.Linear(4, 8), Rooted(8, 8), nn.Linear(8, 2)), torch.zeros(1, 4))
    assert vars(math) == before
