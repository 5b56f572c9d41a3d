"""Stages: budgets on the way to a far one, so that no search has to look further than a model can still be judged."""

from __future__ import annotations

import math

from timm_autoslim.costs.cost import Cost
from timm_autoslim.slimming.budgets import Budget

HALVED = 0.5  # the least share that one stage leaves; docs/benchmarks.md has what two stages gain over one


def list_stages(budget: Budget, widest: Cost) -> list[Budget]:
    """Return the budgets of all stages, the last of which is the budget itself.

    Every stage leaves the same share of each metric, and no less than half.

    Args:
        budget: the goal.
        widest: cost of the widest subnet, with the metrics that the budget limits.

    Example:
        >>> [stage.text for stage in list_stages(Budget((("macs", 25.0),)), Cost(macs=100, params=10))]
        ['macs<=50', 'macs<=25']
    """
    shares = {metric: limit / widest.pick(metric) for metric, limit in budget.limits}
    count = max(1, math.ceil(math.log(min(shares.values())) / math.log(HALVED) - 1e-6))
    between = [
        Budget(tuple((metric, widest.pick(metric) * share ** (index / count)) for metric, share in shares.items()))
        for index in range(1, count)
    ]
    return [*between, budget]
