"""A network over its budget is never returned."""

import pytest
from helpers.searches import held_out, make_supernet

from timm_autoslim import Budget, Conditions, cost, search
from timm_autoslim.errors import BudgetError
from timm_autoslim.slimming.goals import Goal
from timm_autoslim.slimming.network import Found


@pytest.fixture(scope="module")
def supernet():
    return make_supernet()


class Rising:
    """Predicts more at every call."""

    def __init__(self):
        self.milliseconds = 0.0

    def predict(self, supernet, widths):
        self.milliseconds += 1
        return self.milliseconds


def test_a_network_over_budget_is_never_returned(supernet):
    widths = supernet.space.uniform(0.5)
    spent = cost(supernet, widths)
    network = Found.of("searched", Goal(supernet, Budget((("macs", float(spent.macs)), ("params", 1e9)))), widths, 0.5)
    assert (network.metric, network.budget, network.cost) == ("macs", spent.macs, spent)
    with pytest.raises(BudgetError, match=rf"the network: got {spent.macs:,} macs, where it was at most 100\.0 before"):
        Found.of("searched", Goal(supernet, Budget((("macs", 100.0),))), widths, 0.5)
    with pytest.raises(BudgetError, match="needed: the same latency_ms for the same widths at every prediction"):
        search(supernet, {"latency_ms": 6}, held_out(supernet), conditions=Conditions(latency=Rising()))
