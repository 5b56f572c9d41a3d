"""The plan: which searches lead from a trained model to its budgets, and what each of them starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_autoslim.costs.cost import Cost
from timm_autoslim.slimming.budgets import Budget, check_tight

HALVED = 0.5  # the least share that one stage leaves; docs/benchmarks.md has what two stages gain over one


@dataclass(frozen=True)
class Stage:
    """One search of a plan, as `plan_stages` makes them.

    Attributes:
        budget: of the network that it looks for.
        start: budget of the network that it starts from, one of an earlier stage; None for the original.
        asked: whether it is one of the user's budgets. Other networks are only on the way: they are reconstructed, and
            not trained.

    Example:
        >>> print(Stage(Budget((("macs", 20.0),)), start=None, asked=True))
        macs<=20 from the original
    """

    budget: Budget
    start: Budget | None
    asked: bool

    def __str__(self) -> str:
        """Return a line such as "macs<=25% from macs<=50%"."""
        text = f"{self.budget.text} from {self.start.text if self.start else 'the original'}"
        return text if self.asked else f"{text} (on the way, not trained)"


def plan_stages(budgets: Sequence[Budget], widest: Cost, *, from_widest: bool = False) -> list[Stage]:
    """Return the searches that lead to all budgets.

    A budget is tighter than another if it limits the same metrics, and none of them to more. Budgets in different
    metrics are never tighter than each other. A search starts from the last network whose budget is less tight than its
    own; without one from the original. Where it would have to leave less than half, stages between leave the same share
    each, and no less than half: bare slices say little about networks so narrow.

    Args:
        budgets: in the order of the searches, the widest first.
        widest: cost of the original, with all metrics that a budget limits.
        from_widest: whether each budget has one search, from the original, for its rules count from there.

    Raises:
        BudgetError: the original is within a budget already.

    Example:
        >>> budget = Budget((("macs", 20.0),))
        >>> for stage in plan_stages([budget], Cost(macs=80, params=10)):
        ...     print(stage)
        macs<=40 from the original (on the way, not trained)
        macs<=20 from macs<=40
    """
    check_tight(budgets, widest)
    stages: list[Stage] = []
    for budget in budgets:
        asked = [stage.budget for stage in reversed(stages) if stage.asked]
        start = None if from_widest else next((other for other in asked if _is_tighter(budget, other)), None)
        amounts = dict(start.limits) if start else {metric: widest.pick(metric) for metric in budget.metrics}
        for between in () if from_widest else _divide(budget, amounts):
            stages.append(Stage(between, start, asked=False))
            start = between
        stages.append(Stage(budget, start, asked=True))
    return stages


def _is_tighter(budget: Budget, other: Budget) -> bool:
    """Whether a budget limits the same metrics as another, and none of them to more."""
    limits = dict(other.limits)
    return limits.keys() == dict(budget.limits).keys() and all(limit <= limits[m] for m, limit in budget.limits)


def _divide(budget: Budget, amounts: Mapping[str, float]) -> list[Budget]:
    """Return the budgets between these amounts of each metric and a budget."""
    shares = {metric: limit / amounts[metric] for metric, limit in budget.limits}
    count = math.ceil(math.log(min(shares.values())) / math.log(HALVED) - 1e-6)
    return [
        Budget(
            tuple(
                (metric, float(f"{amounts[metric] * share ** (index / count):.4g}")) for metric, share in shares.items()
            )
        )
        for index in range(1, count)
    ]
