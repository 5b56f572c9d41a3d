"""Integers that remember where they came from."""

import copy
import math
import operator
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_autoslim.tracing.origins import (
    FromAttribute,
    FromExpression,
    evaluate,
    find_leaves,
)
from timm_autoslim.tracing.sizes import Integer, Real, Size

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


def test_what_is_no_sum_or_product_of_integers_gives_no_size():
    size = attribute(8)
    assert type(0.5 * size) is float  # Python asks the float alone
    assert type(size * 1j) is complex
    assert type(-size) is Integer
    assert (-size, abs(-size), size % 3, 10 % size, size**2, size & 9, divmod(size, 3)) == (-8, 8, 2, 2, 64, 8, (2, 2))
    assert (size % 5 + 1, 20 - size % 5, size % 5 * size, (size % 5) / 2) == (4, 17, 24, 1.5)
    assert size == 8
    assert hash(size) == hash(8)
    assert f"{size}" == "8"


def test_floats_of_sizes_remember_them():
    size = attribute(8)
    for number, value in ((size * 0.5, 4.0), (size**-0.5, 8**-0.5), (3 / size, 0.375), (size / 3 + 1, 8 / 3 + 1)):
        assert isinstance(number, Real)
        assert number == value
        assert evaluate(number, lambda size: 8) == value
    assert evaluate(-((size / 4) ** 2), lambda size: 16) == -16.0
    assert type(round(size * 0.5)) is Size
    assert type(math.floor(size**0.5)) is Integer
    assert (math.floor(size**0.5), math.ceil(size**0.5), math.trunc(size**0.5), round(size**0.5, 1)) == (2, 3, 2, 2.8)
    assert torch.equal(torch.ones(2) * (size * 0.5), torch.full((2,), 4.0))


def test_functions_of_numpy_remember_them():
    size = attribute(8)
    assert evaluate(np.log2(size), lambda size: 16) == 4.0
    assert type(np.mod(size, 3)) is Integer
    root = np.sqrt(size)
    assert (root.item(), type(root.item()), root.astype(int), root.dtype) == (math.sqrt(8), Real, 2, np.float64)
    assert not hasattr(size, "item")
    assert np.array_equal(np.arange(3) * size, [0, 8, 16])


def test_what_an_integer_can_do():
    size = attribute(8)
    assert (size.bit_length(), bin(size).count("1"), size.real, size.numerator, size.conjugate()) == (4, 1, 8, 8, 8)
    assert (+size, ~size, round(size), round(size, -1), math.floor(size), size.imag) == (8, -9, 8, 10, 8, 0)
    assert type(size.numerator) is Size


def test_copies_and_pickles_are_ordinary_integers():
    for copied in (copy.deepcopy(attribute(8)), pickle.loads(pickle.dumps(attribute(8))), copy.copy(attribute(8))):
        assert type(copied) is int
        assert copied == 8


def test_torch_takes_them_as_integers():
    x = torch.arange(24.0)
    assert x.view(attribute(4), -1).shape == (4, 6)
    assert torch.equal(x[: attribute(6) // 2], x[:3])
    assert [part.numel() for part in x.split([attribute(8), attribute(16)])] == [8, 16]


def test_a_power_with_a_modulus():
    assert pow(attribute(12), 2, 5) == 4
    assert evaluate(pow(attribute(12), 2, 5), lambda size: 3) == 4
