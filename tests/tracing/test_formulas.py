"""Numbers as functions of the widths, one by one and in bulk."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_autoslim.tracing.formulas import AttributeFormula, Count, KernelLength, Terms, make_size_terms

GROUPS = 3
widths = st.tuples(*[st.integers(1, 9)] * GROUPS)
factors_by_group = st.dictionaries(st.integers(0, GROUPS - 1), st.integers(1, 4), max_size=GROUPS)
counts = st.builds(lambda fixed, terms: Count(fixed, tuple(sorted(terms.items()))), st.integers(0, 5), factors_by_group)


def test_a_count_is_affine_in_the_widths():
    count = Count(3, ((0, 2), (2, 5)))
    assert count((1, 7, 1)) == 3 + 2 + 5
    assert count((4, 7, 2)) == 3 + 8 + 10
    assert Count(6, ())((1, 1, 1)) == 6


def test_the_length_of_a_kernel_is_a_product_of_counts():
    assert KernelLength(9, (Count(0, ((0, 1),)), Count(2, ((1, 1),))))((4, 3)) == 9 * 4 * 5
    assert KernelLength(9, ())((4, 3)) == 9


@pytest.mark.parametrize(
    ("formula", "active", "value"),
    [
        (AttributeFormula(8, 8, Count(0, ((0, 1),)), 1), 3, 3),
        (AttributeFormula(16, 8, Count(0, ((0, 1),)), 1), 3, 6),  # two for each channel
        (AttributeFormula(2, 8, Count(0, ((0, 2),)), 1), 2, 1),  # two channels for each step
        (AttributeFormula(64**-0.5, 64, Count(0, ((0, 1),)), -0.5), 16, 0.25),
        (AttributeFormula(0.3, 64, Count(0, ((0, 1),)), -0.5), 64, 0.3),  # the very number at the widest
    ],
)
def test_an_attribute_follows_the_share_of_its_channels(formula, active, value):
    result = formula((active,))
    assert result == value
    assert type(result) is type(value)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.lists(st.integers(0, 3), max_size=3)), max_size=5),
       st.lists(counts, min_size=4, max_size=4), widths)  # fmt: skip
def test_terms_in_bulk_are_what_they_are_one_by_one(rows, lengths, values):
    terms = Terms(lengths, GROUPS, [(scale, divisor, tuple(factors)) for scale, divisor, factors in rows])
    expected = [s * math.prod(lengths[i](values) for i in factors) // d for s, d, factors in rows]
    assert terms(values).tolist() == expected


@given(counts, counts, widths)
def test_the_sizes_of_tensors_are_products_of_their_lengths(rows, columns, values):
    lengths = {("a", 0): rows, ("a", 1): columns, ("b", 1): KernelLength(4, (rows, columns)), ("other", 0): columns}
    tensors = {"a": (2, 7, 7, 3), "b": (1, 5, 49), "c": (4, 6, 6)}
    terms = make_size_terms(lengths, GROUPS, tensors)
    a, b = rows(values), columns(values)
    assert terms(values).tolist() == [2 * a * b * 3, 5 * 4 * a * b, 4 * 36]
