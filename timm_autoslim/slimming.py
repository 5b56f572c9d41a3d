"""Greedy slimming (AutoSlim, arXiv 1903.11728, section 3): one descent from the widest subnet through every budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from timm_autoslim.calibration import batch_statistics, check_batch_statistics
from timm_autoslim.costs import Budget, Budgets, Cost, cost, read_budgets, widest_within
from timm_autoslim.errors import AutoSlimError, BudgetError, EvaluationError
from timm_autoslim.space import ChannelGroup, Widths
from timm_autoslim.supernet import Supernet

Evaluate = Callable[[Callable[[Tensor], Tensor]], float]
Rank = Literal["error", "per_cost"]

FILLED = 0.99  # a budget of which this share is used counts as used up
REFINING_ROUNDS = 3  # rounds of a refinement that score every group; what is left then is filled without a choice


@dataclass(frozen=True)
class Step:
    """One step of the descent: `group` was slimmed to `width`, and then the subnet had this error and cost.

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


@dataclass(frozen=True)
class Found:
    """The network found for one budget.

    Attributes:
        unit, budget: the budget; where it is several limits, the one that the network uses the largest share of.
        widths, cost, error: the network.
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
        """Record what was found for a budget."""
        return cls(*budget.tightest(spent), widths, spent, error, dict(budget.limits))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            **asdict(self.cost),
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


class Scorer:
    """Scores subnets with batch-statistics BatchNorm, each once, and counts what that costs."""

    def __init__(self, supernet: Supernet, evaluate: Evaluate) -> None:
        self.supernet, self.evaluate = supernet, evaluate
        self.evaluations = 0
        self.macs = 0
        self._known: dict[Widths, float] = {}

    def __call__(self, widths: Widths) -> float:
        """Return the error of the subnet of these widths.

        Raises:
            EvaluationError: evaluate raised or returned no finite number; the text names the widths.
            StaleStatisticsError: evaluate switched BatchNorm back to running statistics.
        """
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
    def __init__(self, supernet: Supernet, score: Scorer, rank: Rank, steps: int) -> None:
        self.supernet, self.score, self.rank, self.steps = supernet, score, rank, steps
        self.widths = supernet.space.max()
        self.error = score(self.widths)

    def _candidates(self) -> Iterator[tuple[str, Widths]]:
        for group in self.supernet.space.groups:
            narrower = _narrower(group, self.widths[group.name], self.steps)
            if narrower is not None:
                yield group.name, self.widths.replaced(group.name, narrower)

    def step(self, budget: Budget) -> str:
        """Slim the group that costs least error, and return its name.

        The last step before the budget makes the smallest cut that reaches it, so that little is left unused.
        """
        now = cost(self.supernet, self.widths)
        exceeded = budget.exceeded(now)
        best: tuple[float, float, str, Widths] | None = None
        for name, widths in self._candidates():
            spent = cost(self.supernet, widths)
            if _saved(now, spent, exceeded) <= 0:
                continue
            if budget.holds(spent):
                widths = self._least_cut(name, widths, budget)
            saved = _saved(now, cost(self.supernet, widths), exceeded)
            error = self.score(widths)
            loss = error - self.error
            # A step that lowers the error is best the more it does, whatever it saves.
            key = loss / saved if self.rank == "per_cost" and loss > 0 else loss
            if best is None or (key, -saved) < best[:2]:
                best = (key, -saved, name, widths)
        if best is None:
            unit, limit = budget.tightest(now)
            raise BudgetError(
                f"no group can be slimmed further, and {getattr(now, unit):,} {unit} are above the budget of "
                f"{limit:,.0f}"
            )
        self.widths = best[3]
        self.error = self.score(self.widths)
        return best[2]

    def _least_cut(self, name: str, widths: Widths, budget: Budget) -> Widths:
        """Return the widest width of this group that meets the budget."""
        group = self.supernet.space[name]
        for choice in reversed([c for c in group.choices if widths[name] <= c < self.widths[name]]):
            wider = widths.replaced(name, choice)
            if budget.holds(cost(self.supernet, wider)):
                return wider
        return widths


def _saved(before: Cost, after: Cost, exceeded: tuple[tuple[str, float], ...]) -> float:
    """Return what a step saves of the limits that are exceeded: shares of them, added up in the first one's unit."""
    first = exceeded[0][1]
    return sum(float(getattr(before, unit) - getattr(after, unit)) * (first / limit) for unit, limit in exceeded)


def _refined(supernet: Supernet, score: Scorer, widths: Widths, budget: Budget) -> Widths:
    """Widen groups into what the descent left of the budget, and return the best subnet met on the way.

    Each round widens one group as far as the budget allows, the one whose error is then the least, until less than 1 %
    is left or not one unit more fits. After `REFINING_ROUNDS` rounds the group that fills the budget most is taken
    unseen, so that at most `REFINING_ROUNDS` times the number of groups, and one subnet more, are scored.
    """
    met = [widths]
    taken = 0
    while budget.used(cost(supernet, widths)) < FILLED:
        wider = [widest_within(supernet, widths, name, budget) for name in supernet.space.names]
        wider = sorted(
            (w for w in wider if w != widths), key=lambda w: budget.used(cost(supernet, w)), reverse=True
        )  # so that of equal errors the fuller budget wins
        if not wider:
            break
        if taken < REFINING_ROUNDS:
            widths = min(wider, key=score)
            met.append(widths)
        else:
            widths = wider[0]
        taken += 1
    # wider first: the descent's own subnet stands only where it is truly better
    return min(reversed(met if widths == met[-1] else [*met, widths]), key=score)


def search(
    supernet: Supernet,
    budgets: Budgets,
    evaluate: Evaluate,
    *,
    rank: Rank = "per_cost",
    steps: int = 10,
    refine: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> SearchResult:
    """Slim the supernet greedily down through every budget.

    Each step tries every group a little narrower, scores each candidate, and keeps the one whose error rises least
    (AutoSlim, arXiv 1903.11728, algorithm 1). Candidates are scored with batch-statistics BatchNorm, so stale running
    statistics never enter.

    Args:
        supernet: a trained supernet.
        budgets: by unit ("macs", "params"), a number, a text such as "300M" or "60%" (of the widest), or a list of
            them, each a budget of its own; or a list of texts such as "macs<=300M and params<=2M", where all limits
            of one text must hold for the network found.
        evaluate: called with a callable subnet (images (N, C, H, W) -> logits (N, K)); returns its error or loss on
            held-out images, lower is better. It must use the same images at every call.
        rank: "error" ranks candidates by error alone, as published; "per_cost" by the rise of the error for each
            unit of the budget saved.
        steps: the range of each group is walked in about this many steps.
        refine: fill each budget to within 1 %, where single units allow. A descent in steps of whole divisors stops up
            to a step of some group below its budget, so two networks found "at" one budget may differ by several per
            cent in cost and could not be compared. The descent goes on from the unrefined widths, so one descent still
            serves every budget; a refined network is kept only if its error is no higher. It scores at most 3 subnets
            for each group, and one more, for each budget. Without it, widths stay on the `choices` of the space.
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
    ordered = read_budgets(supernet, budgets)
    score = Scorer(supernet, evaluate)
    descent = _Descent(supernet, score, rank, steps)
    networks: list[Found] = []
    trail: list[Step] = []
    for budget in ordered:
        while not budget.holds(before := cost(supernet, descent.widths)):
            name = descent.step(budget)
            now = cost(supernet, descent.widths)
            made = Step(
                len(trail),
                name,
                descent.widths[name],
                descent.error,
                now.macs,
                now.params,
                *budget.tightest(before),
                score.evaluations,
                dict(budget.limits),
            )
            trail.append(made)
            if on_step is not None:
                on_step(made)
        widths = _refined(supernet, score, descent.widths, budget) if refine else descent.widths
        networks.append(Found.of(budget, widths, cost(supernet, widths), score(widths)))
    return SearchResult(tuple(networks), tuple(trail), score.evaluations, score.macs)
