"""What follows a descent: filling what it left of a budget, and trading width between groups."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from timm_autoslim.slimming.candidates import narrow
from timm_autoslim.slimming.goals import FILLED, Goal, fill, widen
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.utils.tables import Table

ROUNDS = 3  # that score every group; what is left then is filled without a choice

REFINEMENTS: Table[tuple[bool, ...]] = Table("refine")
"""Refinements by name, as passes over the groups: on their choices alone (False), or on all widths (True)."""
REFINEMENTS.add("units")((False, True))
REFINEMENTS.add("choices")((False,))
REFINEMENTS.add("none")(())


def fill_by_loss(
    goal: Goal,
    widths: Widths,
    passes: Sequence[bool],
    select: Callable[[Widths, list[Widths]], list[Widths]],
    score: Callable[[Sequence[Widths]], list[float]],
) -> list[Widths]:
    """Widen one group after the other until less than 1 % of the budget is left or nothing wider fits.

    Each round widens one group as far as the budget allows, the one whose loss is then the least. After `ROUNDS` rounds
    the group that fills the budget most is widened without scoring. Groups go to single units only where their choices
    cannot fill the budget: few of them then leave the choices.

    Args:
        goal: the budget.
        widths: the subnet to start from.
        passes: a value of `REFINEMENTS`.
        select: chooses which changes of a subnet are scored.
        score: returns the losses of subnets.

    Returns:
        The subnets that were chosen by their loss, and the last one.
    """
    subnets: list[Widths] = []
    waiting = list(passes)
    while waiting and goal.used(widths) < FILLED:
        wider = [widen(goal, widths, name, exact=waiting[0]) for name in goal.supernet.space.names]
        # the fullest first, so that of equal losses the fuller budget wins
        wider = sorted((w for w in wider if w != widths), key=goal.used, reverse=True)
        if not wider:
            waiting.pop(0)
        elif len(subnets) < ROUNDS:
            changes = select(widths, wider)
            losses = score(changes)
            widths = changes[losses.index(min(losses))]
            subnets.append(widths)
        else:
            widths = wider[0]
    return subnets if not subnets or subnets[-1] == widths else [*subnets, widths]


def trade(goal: Goal, widths: Widths, passes: Sequence[bool], steps: int, draws: random.Random) -> Widths:
    """Narrow one or two random groups by a step or two, and widen others into what that sets free."""
    space = goal.supernet.space
    names = draws.sample(space.names, len(space))
    count = draws.choice((1, 2))
    for name in names[:count]:
        for _ in range(draws.choice((1, 2))):
            width = narrow(space[name], widths[name], steps)
            widths = widths if width is None else widths.replace(name, width)
    for exact in passes:
        widths = fill(goal, widths, names[count:] + names[:count], exact=exact)
    return widths
