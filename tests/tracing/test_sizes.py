"""Integers that remember where they came from."""

import copy
import operator
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_autoslim.tracing.origins import (
    FromAttribute,
    FromExpression,
    find_leaves,
)
from timm_autoslim.tracing.sizes import Integer, Size

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


def test_what_is_not_integer_arithmetic_gives_ordinary_numbers():
    size = attribute(8)
    assert type(size * 0.5) is float
    assert type(0.5 * size) is float
    assert size * 0.5 == 4.0
    assert type(size**-0.5) is float
    assert type(-size) is Integer
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


def test_a_power_with_a_modulus_is_a_plain_number():
    assert pow(attribute(12), 2, 5) == 4
    assert type(pow(attribute(12), 2, 5)) is int
