"""Results are values that a file gives back."""

import pytest
from helpers.searches import IMAGE, Branches
from helpers.zoo import randomise

from timm_autoslim import Budget, Cost, Found, convert
from timm_autoslim.errors import BudgetError


@pytest.fixture
def supernet():
    return convert(randomise(Branches()), IMAGE, min=2, divisor=2)


def test_a_network_over_budget_is_never_returned(supernet):
    budget, widths = Budget((("macs", 100.0), ("params", 10.0))), supernet.space.max()
    assert Found.of(budget, widths, Cost(100, 9), 0.5).limits == {"macs": 100.0, "params": 10.0}
    with pytest.raises(BudgetError, match=r"network found costs 101 macs where it cost at most 100\.0 before"):
        Found.of(budget, widths, Cost(101, 9), 0.5)
