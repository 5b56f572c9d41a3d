"""What a search found, as values that a file can keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from timm_autoslim.costs.cost import Cost
from timm_autoslim.errors import BudgetError
from timm_autoslim.slimming.budgets import (
    Budget,
)
from timm_autoslim.supernet.space import Widths


@dataclass(frozen=True)
class Step:
    """One step of the descent: `group` was slimmed to `width`, and then the subnet had this error and cost.

    In the fast mode the error is that on the part of the held-out images which this step looked at.

    `budget` is the next budget on the way down, in `unit`; `evaluations` counts the subnets scored so far. Where the
    budget is several limits (`limits`, by unit), `unit` and `budget` are the one that was furthest exceeded before.
    """

    index: int
    group: str
    width: int
    error: float
    macs: int
    params: int
    unit: str
    budget: float
    evaluations: int
    limits: Mapping[str, float] = field(hash=False)
    spent: Mapping[str, float] = field(hash=False)  # by unit, of all that any budget of the search limits


@dataclass(frozen=True)
class Found:
    """The network found for one budget.

    Attributes:
        unit, budget: the budget; where it is several limits, the one that the network uses the largest share of.
        widths, cost, error: the network; its cost knows MACs, parameters and the units of the budget.
        limits: all limits of the budget, by unit.
    """

    unit: str
    budget: float
    widths: Widths
    cost: Cost
    error: float
    limits: Mapping[str, float] = field(hash=False)

    @classmethod
    def of(cls, budget: Budget, widths: Widths, spent: Cost, error: float) -> Found:
        """Record what was found for a budget.

        Raises:
            BudgetError: the cost is above the budget, which only a latency that changes its mind can cause.
        """
        for unit, limit in budget.exceeded(spent):
            raise BudgetError(
                f"the network found costs {getattr(spent, unit):,} {unit} where it cost at most {limit:,} before; "
                f"needed: the same {unit} for the same widths at every call of supernet.conditions.latency"
            )
        return cls(*budget.tightest(spent), widths, spent.kept(dict(budget.limits)), error, dict(budget.limits))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            **asdict(self.cost),
            **{unit: getattr(self.cost, unit) for unit in self.limits},
            "unit": self.unit,
            "budget": self.budget,
            "limits": dict(self.limits),
            "error": self.error,
            "widths": self.widths.to_dict(),
        }


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        networks: one for each budget, in the order of the descent (the largest share of the whole first).
        steps: the descent.
        evaluations: number of subnets scored.
        evaluated_macs: their forward work: images times MACs, added up.
    """

    networks: tuple[Found, ...]
    steps: tuple[Step, ...]
    evaluations: int
    evaluated_macs: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "networks": [n.to_dict() for n in self.networks],
            "steps": [asdict(s) for s in self.steps],
            "evaluations": self.evaluations,
            "evaluated_macs": self.evaluated_macs,
        }
