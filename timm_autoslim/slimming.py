"""Greedy slimming (AutoSlim, arXiv 1903.11728, section 3): one descent from the widest subnet through every budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from timm_autoslim.calibration import batch_statistics, check_batch_statistics
from timm_autoslim.costs import UNITS, Cost, check_reach, check_unit, cost, parse_budget
from timm_autoslim.errors import AutoSlimError, BudgetError, EvaluationError
from timm_autoslim.space import ChannelGroup, Widths
from timm_autoslim.supernet import Supernet

Evaluate = Callable[[Callable[[Tensor], Tensor]], float]
Budgets = Mapping[str, float | str | Sequence[float | str]]
Rank = Literal["error", "per_cost"]


@dataclass(frozen=True)
class Step:
    """One step of the descent: `group` was slimmed to `width`, and then the subnet had this error and cost.

    `budget` is the next budget on the way down, in `unit`; `evaluations` counts the subnets scored so far.
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


@dataclass(frozen=True)
class Found:
    """The network found for one budget."""

    unit: str
    budget: float
    widths: Widths
    cost: Cost
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            **asdict(self.cost),
            "unit": self.unit,
            "budget": self.budget,
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
        evaluated_macs: their MACs added up, for one image each.
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


def _budgets(supernet: Supernet, budgets: Budgets) -> list[tuple[str, float]]:
    """Validate all budgets before anything is evaluated, and order them as the descent meets them."""
    if not isinstance(budgets, Mapping) or not budgets:
        raise BudgetError(
            f'got the budgets {budgets!r}; needed: a dict such as {{"macs": ["60%", "300M"]}}, units {list(UNITS)}'
        )
    whole = cost(supernet)
    found = []
    for unit, values in budgets.items():
        size = getattr(whole, check_unit(unit))
        for value in [values] if isinstance(values, (int, float, str)) else values:
            number = parse_budget(value, size)
            check_reach(supernet.space, supernet.graph, unit, number)
            found.append((number / size, unit, number))
    if not found:
        raise BudgetError("got no budget; needed: at least one number")
    return [(unit, number) for _, unit, number in sorted(found, reverse=True)]


class _Scorer:
    """Scores subnets with batch-statistics BatchNorm, and counts what that costs."""

    def __init__(self, supernet: Supernet, evaluate: Evaluate) -> None:
        self.supernet, self.evaluate = supernet, evaluate
        self.evaluations = 0
        self.macs = 0
        self._known: dict[Widths, float] = {}

    def __call__(self, widths: Widths) -> float:
        if widths in self._known:
            return self._known[widths]
        model = self.supernet.model
        try:
            with torch.no_grad(), self.supernet.at(widths), batch_statistics(model):
                error = float(self.evaluate(self.supernet))
                check_batch_statistics(model)
        except AutoSlimError:
            raise
        except Exception as cause:  # whatever the user's callable raises, the widths must be named
            raise EvaluationError(
                f"evaluate raised {type(cause).__name__}: {cause}; at the widths {widths.to_dict()}"
            ) from cause
        if not math.isfinite(error):
            raise EvaluationError(
                f"evaluate returned {error}; needed: a finite error or loss; at the widths {widths.to_dict()}"
            )
        self.evaluations += 1
        self.macs += cost(self.supernet, widths).macs
        self._known[widths] = error
        return error


def _narrower(group: ChannelGroup, width: int, steps: int) -> int | None:
    """Return the next width down: about `1 / steps` of the group's range, on its choices."""
    below = [c for c in group.choices if c < width]
    if not below:
        return None
    stride = max(1, math.ceil((group.size - group.choices[0]) / steps))
    return min(below, key=lambda c: (abs(c - (width - stride)), c))


class _Descent:
    def __init__(self, supernet: Supernet, score: _Scorer, rank: Rank, steps: int) -> None:
        self.supernet, self.score, self.rank, self.steps = supernet, score, rank, steps
        self.widths = supernet.space.max()
        self.error = score(self.widths)

    def _candidates(self) -> Iterator[tuple[str, Widths]]:
        for group in self.supernet.space.groups:
            narrower = _narrower(group, self.widths[group.name], self.steps)
            if narrower is not None:
                yield group.name, self.widths.replaced(group.name, narrower)

    def step(self, unit: str, budget: float) -> str:
        """Slim the group that costs least error, and return its name.

        The last step before the budget makes the smallest cut that reaches it, so that little is left unused.
        """
        now = getattr(cost(self.supernet, self.widths), unit)
        best: tuple[float, float, str, Widths] | None = None
        for name, widths in self._candidates():
            saved = now - getattr(cost(self.supernet, widths), unit)
            if saved <= 0:
                continue
            if now - saved < budget:
                widths = self._least_cut(name, widths, unit, budget)
                saved = now - getattr(cost(self.supernet, widths), unit)
            error = self.score(widths)
            loss = error - self.error
            # A step that lowers the error is best the more it does, whatever it saves.
            key = loss / saved if self.rank == "per_cost" and loss > 0 else loss
            if best is None or (key, -saved) < best[:2]:
                best = (key, -saved, name, widths)
        if best is None:
            raise BudgetError(
                f"no group can be slimmed further, and {now:,} {unit} are above the budget of {budget:,.0f}"
            )
        self.widths = best[3]
        self.error = self.score(self.widths)
        return best[2]

    def _least_cut(self, name: str, widths: Widths, unit: str, budget: float) -> Widths:
        """Return the widest width of this group that meets the budget."""
        group = self.supernet.space[name]
        for choice in reversed([c for c in group.choices if widths[name] <= c < self.widths[name]]):
            wider = widths.replaced(name, choice)
            if getattr(cost(self.supernet, wider), unit) <= budget:
                return wider
        return widths


def search(
    supernet: Supernet,
    budgets: Budgets,
    evaluate: Evaluate,
    *,
    rank: Rank = "per_cost",
    steps: int = 10,
    on_step: Callable[[Step], None] | None = None,
) -> SearchResult:
    """Slim the supernet greedily down through every budget.

    Each step tries every group a little narrower, scores each candidate, and keeps the one whose error rises least
    (AutoSlim, arXiv 1903.11728, algorithm 1). Candidates are scored with batch-statistics BatchNorm, so stale running
    statistics never enter.

    Args:
        supernet: a trained supernet.
        budgets: by unit ("macs", "params"), a number, a text such as "300M" or "60%" (of the widest), or a list of
            them.
        evaluate: called with a callable subnet (images (N, C, H, W) -> logits (N, K)); returns its error or loss on
            held-out images, lower is better. It must use the same images at every call.
        rank: "error" ranks candidates by error alone, as published; "per_cost" by the rise of the error for each
            unit of the budget saved.
        steps: the range of each group is walked in about this many steps.
        on_step: called after every step.

    Raises:
        BudgetError: a budget is malformed or out of reach; nothing was evaluated then.
        EvaluationError: evaluate raised or returned no finite number; the text names the widths.
        StaleStatisticsError: evaluate switched BatchNorm back to running statistics.
    """
    if rank not in get_args(Rank):
        raise ValueError(f"got rank={rank!r}; needed: one of {list(get_args(Rank))}")
    if steps < 1:
        raise ValueError(f"got steps={steps}; needed: at least 1")
    ordered = _budgets(supernet, budgets)
    score = _Scorer(supernet, evaluate)
    descent = _Descent(supernet, score, rank, steps)
    networks: list[Found] = []
    trail: list[Step] = []
    for unit, budget in ordered:
        while getattr(cost(supernet, descent.widths), unit) > budget:
            name = descent.step(unit, budget)
            now = cost(supernet, descent.widths)
            made = Step(
                len(trail),
                name,
                descent.widths[name],
                descent.error,
                now.macs,
                now.params,
                unit,
                budget,
                score.evaluations,
            )
            trail.append(made)
            if on_step is not None:
                on_step(made)
        networks.append(Found(unit, budget, descent.widths, cost(supernet, descent.widths), descent.error))
    return SearchResult(tuple(networks), tuple(trail), score.evaluations, score.macs)
