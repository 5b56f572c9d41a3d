"""Numbers are found as products and sums of active lengths, from the values that they had."""

import pytest
import torch
from helpers.models import TwoGroups

from timm_autoslim import convert
from timm_autoslim.costs.infer import FormulaFinder
from timm_autoslim.tracing.formulas import Terms

RUNS = [(32, 64), (20, 50), (31, 40), (17, 33)]  # widths of stem and inner
OTHER = (9, 23)


@pytest.fixture(scope="module")
def graph():
    return convert(TwoGroups(32), torch.zeros(1, 3, 8, 8)).graph


@pytest.mark.parametrize(
    "number",
    [
        lambda stem, inner: 7,
        lambda stem, inner: stem,
        lambda stem, inner: 12 * inner,
        lambda stem, inner: 3 * stem * inner,
        lambda stem, inner: stem * stem,
        lambda stem, inner: stem + inner,
        lambda stem, inner: inner - stem,
        lambda stem, inner: stem + 5,
    ],
)
def test_a_number_is_found_at_other_widths_too(graph, number):
    assert graph.names == ("stem", "inner")
    finder = FormulaFinder(graph, RUNS)
    row = finder.find(tuple(number(*widths) for widths in RUNS))
    assert Terms(finder.lengths, 2, [row])(OTHER).tolist() == [number(*OTHER)]


def test_what_is_neither_a_product_nor_a_sum_is_not_found(graph):
    assert FormulaFinder(graph, RUNS).find((3, 5, 11, 2)) is None


def test_runs_at_which_two_lengths_look_alike_are_told():
    graph = convert(TwoGroups(32), torch.zeros(1, 3, 8, 8)).graph
    assert not FormulaFinder(graph, RUNS).is_ambiguous()
    assert FormulaFinder(graph, [(8, 8), (20, 20)]).is_ambiguous()
