"""The network that a method chose for a budget, and the steps of a descent, as values that a file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm_autoslim.costs.cost import Cost, cost_by_module
from timm_autoslim.errors import BudgetError
from timm_autoslim.slimming.budgets import make_slug
from timm_autoslim.slimming.goals import Goal
from timm_autoslim.supernet.widths import Widths


@dataclass(frozen=True)
class Step:
    """One step of a descent: `group` was slimmed to `width`, and then the subnet had this loss and cost.

    In the fast mode the loss is that on the part of the held-out images which this step looked at.

    Attributes:
        index: which step it is.
        group, width: what was slimmed.
        loss, macs, params: of the subnet after the step.
        metric, budget: the limit of the next budget on the way down that was furthest exceeded before the step.
        evaluations: subnets scored so far.
        limits: all limits of that budget, by metric.
        spent: what the subnet costs, in all metrics that any budget of the search limits.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert, search
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> result = search(supernet, {"macs": "95%"}, lambda subnet: 0.0)
        >>> for step in result.steps:
        ...     print(f"{step.index}: {step.group} to {step.width}, loss {step.loss:.2f}")
        0: conv1.6 to 56, loss 0.00
    """

    index: int
    group: str
    width: int
    loss: float
    macs: int
    params: int
    metric: str
    budget: float
    evaluations: int
    limits: Mapping[str, float] = field(hash=False)
    spent: Mapping[str, float] = field(hash=False)


@dataclass(frozen=True)
class Found:
    """The network that a method chose for one budget.

    Attributes:
        method: "searched", or a key of `BASELINES`.
        metric, budget: the limit of which the network uses the largest share.
        text: the budget as the user wrote it, such as "macs<=60%".
        widths, cost, loss: the network; its cost has MACs, parameters and the metrics of the budget. Where the search
            maximised a score, the loss is its negative.
        limits: all limits of the budget, by metric.
        macs_by_module: the network's MACs by module, in the order of execution.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert, search
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> result = search(supernet, {"macs": ["60%", "40%"]}, lambda subnet: 0.0, refine="none")
        >>> for network in result.networks:
        ...     print(network.text, network.cost.macs <= network.budget)
        macs<=60% True
        macs<=40% True
        >>> model = supernet.extract(result.networks[0].widths)
    """

    method: str
    metric: str
    budget: float
    text: str
    widths: Widths
    cost: Cost
    loss: float
    limits: Mapping[str, float] = field(hash=False)
    macs_by_module: Mapping[str, int] = field(hash=False, repr=False)

    @classmethod
    def of(cls, method: str, goal: Goal, widths: Widths, loss: float) -> Found:
        """Return the network of these widths, which a method chose for a goal.

        Raises:
            BudgetError: the network is above the budget: the latency was predicted lower before, for the same widths.
        """
        cost, budget = goal.cost(widths), goal.budget
        for metric, limit in budget.exceeded(cost):
            got = f"{cost.pick(metric):,} {metric}, where it was at most {limit:,} before"
            needed = f"the same {metric} for the same widths at every prediction"
            raise BudgetError.at("the network", got=got, needed=needed)
        by_module = cost_by_module(goal.supernet, widths)
        return cls(method, *budget.tightest(cost), budget.text, widths, cost, loss, dict(budget.limits), by_module)

    @property
    def name(self) -> str:
        """A name of the budget and the method, such as `macs-60pct-params-2M-searched`."""
        return f"{make_slug(self.text)}-{self.method}"

    def to_dict(self) -> dict[str, Any]:
        """Return the network for JSON; the method is that of the result that holds it."""
        values = {key: getattr(self, key) for key in ("metric", "budget", "text", "loss")}
        return {
            **values,
            "cost": self.cost.to_dict(),
            "limits": dict(self.limits),
            "widths": self.widths.to_dict(),
            "macs_by_module": dict(self.macs_by_module),
        }
