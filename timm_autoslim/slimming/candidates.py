"""The candidates of one step of a descent: every group a step narrower, and how they are ranked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from timm_autoslim.costs.cost import Cost
from timm_autoslim.slimming.goals import Goal
from timm_autoslim.supernet.widths import ChannelGroup, Widths
from timm_autoslim.utils.tables import Table

RANKINGS: Table[Callable[[float, float], float]] = Table("rank")
"""Rankings by name; each gets the rise of the loss and the cost that a candidate saves, and returns a key.

The candidate with the lowest key is the next step.
"""


@RANKINGS.add("loss")
def _rank_by_loss(rise: float, saved: float) -> float:
    """The rise of the loss alone, as published (arXiv 1903.11728, algorithm 1)."""
    return rise


@RANKINGS.add("per_cost")
def _rank_per_cost(rise: float, saved: float) -> float:
    """The rise of the loss for each part of the budget saved; where the loss falls, the fall, whatever it saves."""
    return rise / saved if rise > 0 and saved > 0 else rise


@dataclass(frozen=True)
class Candidate:
    """One group a step narrower.

    Attributes:
        name: the group.
        widths: those of the subnet.
        saved: how much cheaper the subnet is, see `_save`.
    """

    name: str
    widths: Widths
    saved: float


def narrow(group: ChannelGroup, width: int, steps: int) -> int | None:
    """Return the next width down: about `1 / steps` of the group's range, on its choices; None at the narrowest."""
    below = [c for c in group.choices if c < width]
    if not below:
        return None
    stride = max(1, math.ceil((group.size - group.choices[0]) / steps))
    return min(below, key=lambda c: (abs(c - (width - stride)), c))


def list_candidates(goal: Goal, widths: Widths, steps: int) -> list[Candidate]:
    """Return the candidates of a subnet that is over its budget.

    The last step before the budget makes the smallest cut that reaches it, so that little is left unused.
    """
    before = goal.cost(widths)
    exceeded = goal.budget.exceeded(before)
    candidates = []
    for group in goal.supernet.space.groups:
        width = narrow(group, widths[group.name], steps)
        if width is None:
            continue
        narrower = widths.replace(group.name, width)
        if goal.holds(narrower):
            narrower = _cut_least(goal, widths, narrower, group)
        candidates.append(Candidate(group.name, narrower, _save(before, goal.cost(narrower), exceeded)))
    # Where no step saves memory or latency, as where attention would lose its fused kernel by one step and win it
    # back by the next, the descent goes on by what costs least.
    most = max(c.saved for c in candidates)
    return [c for c in candidates if c.saved > 0 or c.saved == most]


def _cut_least(goal: Goal, widths: Widths, narrower: Widths, group: ChannelGroup) -> Widths:
    """Return the widest width of this group that holds the budget; that of `narrower` does."""
    between = [c for c in group.choices if narrower[group.name] <= c < widths[group.name]]
    for choice in reversed(between):
        wider = narrower.replace(group.name, choice)
        if goal.holds(wider):
            return wider
    return narrower


def _save(before: Cost, after: Cost, exceeded: tuple[tuple[str, float], ...]) -> float:
    """Return what a step saves of the exceeded limits: shares of them, added up in the metric of the first one."""
    first = exceeded[0][1]
    return sum(float(before.pick(metric) - after.pick(metric)) * (first / limit) for metric, limit in exceeded)
