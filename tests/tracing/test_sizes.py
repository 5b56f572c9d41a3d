"""Integers that remember where they came from."""

import copy
import operator
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_autoslim.tracing.sizes import (
    FromAttribute,
    FromDimension,
    FromExpression,
    Remainder,
    Size,
    find_factors,
    find_leaves,
    find_quotient,
    is_proportional,
)

OPERATORS = [operator.add, operator.sub, operator.mul, operator.floordiv]


def attribute(value, path="layer.width"):
    return Size(value, FromAttribute(path))


@pytest.mark.parametrize("compute", OPERATORS, ids=lambda f: f.__name__)
@given(a=st.integers(-99, 99), b=st.integers(1, 99))
def test_arithmetic_gives_the_same_result_and_remembers_its_operands(compute, a, b):
    left, right = attribute(a, "left"), attribute(b, "right")
    for x, y, paths in ((left, right, ["left", "right"]), (left, b, ["left"]), (a, right, ["right"])):
        result = compute(x, y)
        assert type(result) is Size
        assert int(result) == compute(a, b)
        assert isinstance(result.origin, FromExpression)
        assert [leaf.origin.path for leaf in find_leaves(result)] == paths


def test_expressions_nest_down_to_attributes_and_dimensions():
    vector = np.arange(6)
    dimension = Size(6, FromDimension(vector))
    one, other = find_leaves((attribute(8) // 2 + dimension) * 3)
    assert (int(one), int(other)) == (8, 6)
    assert one.origin == FromAttribute("layer.width")
    assert other.origin.vector is vector
    assert list(find_leaves(dimension)) == [dimension]


HEADS, CHANNELS = attribute(4, "heads"), attribute(8, "channels")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (CHANNELS, True),
        (2 * CHANNELS, True),
        (CHANNELS // 2, True),
        (CHANNELS + 1, False),  # what is added does not scale
        (CHANNELS - 1, False),
        (16 // CHANNELS, False),
        (CHANNELS * HEADS, False),
        (CHANNELS + CHANNELS, True),
        (3 * (CHANNELS + HEADS), True),
    ],
)
def test_a_size_is_proportional_if_it_doubles_with_all_that_it_comes_from(size, expected):
    assert is_proportional(size) is expected


@pytest.mark.parametrize(
    ("size", "paths"),
    [
        (CHANNELS, ["channels"]),
        (CHANNELS * HEADS, ["channels", "heads"]),
        (CHANNELS // HEADS, ["channels"]),  # twice the heads would halve it
        (CHANNELS * (HEADS + 1), []),
        (CHANNELS + HEADS, []),
    ],
)
def test_the_factors_of_a_size_are_those_of_which_one_alone_makes_it_scale(size, paths):
    assert [leaf.origin.path for leaf in find_factors(size)] == paths


def test_only_a_quotient_of_two_that_scale_has_both_as_operands():
    assert [leaf.origin.path for leaf in find_quotient(CHANNELS // HEADS)] == ["channels", "heads"]
    for size in (CHANNELS, CHANNELS // 2, 32 // HEADS, CHANNELS * HEADS, CHANNELS // (HEADS + 1)):
        assert find_quotient(size) is None


def test_what_is_not_integer_arithmetic_gives_ordinary_numbers():
    size = attribute(8)
    assert type(size * 0.5) is float
    assert type(0.5 * size) is float
    assert size * 0.5 == 4.0
    assert type(size**-0.5) is float
    assert type(-size) is Remainder
    assert (-size, abs(-size), size % 3, 10 % size, size**2, size & 9, divmod(size, 3)) == (-8, 8, 2, 2, 64, 8, (2, 2))
    assert (size % 5 + 1, 20 - size % 5, size % 5 * size, (size % 5) / 2) == (4, 17, 24, 1.5)
    assert size == 8
    assert hash(size) == hash(8)
    assert f"{size}" == "8"


def test_copies_and_pickles_are_ordinary_integers():
    for copied in (copy.deepcopy(attribute(8)), pickle.loads(pickle.dumps(attribute(8))), copy.copy(attribute(8))):
        assert type(copied) is int
        assert copied == 8


def test_torch_takes_them_as_integers():
    x = torch.arange(24.0)
    assert x.view(attribute(4), -1).shape == (4, 6)
    assert torch.equal(x[: attribute(6) // 2], x[:3])
    assert [part.numel() for part in x.split([attribute(8), attribute(16)])] == [8, 16]
