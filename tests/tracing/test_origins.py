"""What a number was computed from, and how it changes with that."""

import numpy as np
import pytest

from timm_autoslim.tracing.origins import (
    FromAttribute,
    FromDimension,
    evaluate,
    find_factors,
    find_leaves,
    find_quotient,
    is_proportional,
    list_leaves,
)
from timm_autoslim.tracing.sizes import Size


def attribute(value, path="layer.width"):
    return Size(value, FromAttribute(path))


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


def test_a_number_is_computed_again_from_other_sizes():
    number = (CHANNELS // HEADS) ** 2 % 5
    values = {"heads": 2, "channels": 12}
    assert evaluate(number, lambda size: values[size.origin.path]) == 36 % 5
    assert evaluate(7, lambda size: 0) == 7
    assert [leaf.origin.path for leaf in list_leaves((number, 3, HEADS))] == ["channels", "heads", "heads"]
