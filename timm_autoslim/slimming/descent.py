"""Greedy slimming (AutoSlim, arXiv 1903.11728, section 3): one descent from the widest subnet through every budget."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from timm_autoslim.costs.cost import Cost, cost
from timm_autoslim.errors import ConfigError
from timm_autoslim.slimming.budgets import (
    FILLED,
    Budget,
    Budgets,
    fill_budget,
    read_budgets,
    widest_within,
    within_reach,
)
from timm_autoslim.slimming.result import Found, SearchResult, Step
from timm_autoslim.slimming.scoring import Evaluate, Scorer, Scores, Team
from timm_autoslim.supernet.space import ChannelGroup, Widths
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.utils.arguments import check_integer, make_generator

Mode = Literal["fast", "reference"]
Rank = Literal["error", "per_cost"]
Refine = Literal["units", "choices", "none"]

REFINING_ROUNDS = 3  # rounds of a refinement that score every group; what is left then is filled without a choice


def _narrower(group: ChannelGroup, width: int, steps: int) -> int | None:
    """Return the next width down: about `1 / steps` of the group's range, on its choices."""
    below = [c for c in group.choices if c < width]
    if not below:
        return None
    stride = max(1, math.ceil((group.size - group.choices[0]) / steps))
    return min(below, key=lambda c: (abs(c - (width - stride)), c))


@dataclass(frozen=True)
class _Candidate:
    """One group a step narrower: its name, the widths of the whole subnet, and what that saves of a budget."""

    name: str
    widths: Widths
    saved: float


class _Descent:
    """A descent as published: every step scores one step of every group, on all held-out images."""

    STEPS = 10  # of the range of each group; section 4

    def __init__(self, supernet: Supernet, score: Scorer, rank: Rank, steps: int, order: Mapping[str, int]) -> None:
        self.supernet, self.score, self.rank, self.steps, self.order = supernet, score, rank, steps, order
        self.widths = supernet.space.max()
        self.error = self._errors([self.widths])[0]

    def step(self, budget: Budget) -> str:
        """Slim the group that costs least error, and return its name.

        The last step before the budget makes the smallest cut that reaches it, so that little is left unused.
        """
        candidates = self._candidates(budget)
        errors = self._errors([c.widths for c in candidates])
        best = min(zip(candidates, errors, strict=True), key=lambda pair: self._key(pair[0], pair[1] - self.error))
        self.widths, self.error = best[0].widths, best[1]
        return best[0].name

    def _errors(self, subnets: Sequence[Widths]) -> list[float]:
        return self.score.many(subnets)

    def refined(self, budget: Budget, refine: Refine) -> Widths:
        """Widen groups into what the descent left of the budget, and return the best subnet met on the way."""
        start = self.widths
        if not budget.holds(cost(self.supernet, start)):  # the descent ended at the narrowest, which is not the least
            start = within_reach(self.supernet, budget)
        met = [start, *self._fill(start, budget, refine)]
        # wider first: the descent's own subnet stands only where it is truly better
        return min(reversed(met), key=self.score)

    def _fill(self, widths: Widths, budget: Budget, refine: Refine) -> list[Widths]:
        """Widen one group after the other until less than 1 % of the budget is left or nothing wider fits.

        Each round widens one group as far as the budget allows, the one whose error is then the least. After
        `REFINING_ROUNDS` rounds the group that fills the budget most is taken unseen. Groups go to single units only
        where their choices cannot fill the budget: few of them then leave the choices.

        Returns:
            The subnets that were chosen by their error, and the last one.
        """
        met: list[Widths] = []
        exact = False
        while refine != "none" and budget.used(cost(self.supernet, widths)) < FILLED:
            wider = [widest_within(self.supernet, widths, n, budget, exact=exact) for n in self.supernet.space.names]
            wider = sorted(
                (w for w in wider if w != widths), key=lambda w: budget.used(cost(self.supernet, w)), reverse=True
            )  # so that of equal errors the fuller budget wins
            if not wider and (exact or refine == "choices"):
                break
            if not wider:
                exact = True
            elif len(met) < REFINING_ROUNDS:
                promising = self._promising(widths, wider)
                errors = self._errors(promising)
                widths = promising[errors.index(min(errors))]
                met.append(widths)
            else:
                widths = wider[0]
        return met if not met or met[-1] == widths else [*met, widths]

    def _promising(self, widths: Widths, changed: list[Widths]) -> list[Widths]:
        """Choose which of these changes of the widths to score."""
        return changed

    def _candidates(self, budget: Budget) -> list[_Candidate]:
        now = cost(self.supernet, self.widths)
        exceeded = budget.exceeded(now)
        found = []
        for group in self.supernet.space.groups:
            narrower = _narrower(group, self.widths[group.name], self.steps)
            if narrower is None:
                continue
            widths = self.widths.replaced(group.name, narrower)
            if budget.holds(cost(self.supernet, widths)):
                widths = self._least_cut(group.name, widths, budget)
            found.append(_Candidate(group.name, widths, _saved(now, cost(self.supernet, widths), exceeded)))
        # Where no step saves memory or latency, as where attention would lose its fused kernel by one step and win it
        # back by the next, the descent goes on by what costs least.
        most = max(c.saved for c in found)
        return [c for c in found if c.saved > 0 or c.saved == most]

    def _key(self, candidate: _Candidate, loss: float) -> tuple[float, float, int]:
        """Order candidates, the best first, by how much they raise the error."""
        # A step that lowers the error is best the more it does, whatever it saves.
        key = loss / candidate.saved if self.rank == "per_cost" and loss > 0 and candidate.saved > 0 else loss
        return key, -candidate.saved, self.order[candidate.name]

    def _least_cut(self, name: str, widths: Widths, budget: Budget) -> Widths:
        """Return the widest width of this group that meets the budget."""
        group = self.supernet.space[name]
        for choice in reversed([c for c in group.choices if widths[name] <= c < self.widths[name]]):
            wider = widths.replaced(name, choice)
            if budget.holds(cost(self.supernet, wider)):
                return wider
        return widths


class _FastDescent(_Descent):
    """A descent that scores few candidates on few images.

    The rise of the error that a step of a group caused when it was last scored is a good guess of what it causes now,
    so candidates are scored in the order of this guess, and only until none that is left promises more than the best
    of those that were scored (lazy greedy; Minoux, 1978). The images are as many as keep the work of one score the
    same all the way down: a share of `SHARE` for the widest, all of them for a subnet of that share of its MACs.

    A descent never takes a step back, so a refinement ends with trades at the budget, which do.
    """

    STEPS = 5  # larger than published, to stand out from the noise of fewer images
    LOOK = 2  # candidates that are scored together
    FILLING = 6  # candidates that are scored in each round of filling a budget
    SHARE = 3 / 16  # of the held-out images, for the widest
    TRADES = 3  # of the widths of two or three groups, for each group
    TOGETHER = 6  # trades that are scored together, of which the best is taken if it lowers the error

    def __init__(self, supernet: Supernet, score: Scorer, rank: Rank, steps: int, order: Mapping[str, int]) -> None:
        self.whole = cost(supernet).macs
        self.rises: dict[str, float] = {}  # by group: rise of the error for each unit of its width, as last scored
        super().__init__(supernet, score, rank, steps, order)

    def refined(self, budget: Budget, refine: Refine) -> Widths:
        """Fill the budget, then trade widths between groups as long as that lowers the error."""
        widths = super().refined(budget, refine)
        if refine == "none":
            return widths
        error = self.score(widths)
        draws = random.Random(repr(self.order))  # the order is drawn by the seed; every budget trades alike
        for _ in range(math.ceil(self.TRADES * len(self.supernet.space) / self.TOGETHER)):
            traded = [self._traded(widths, budget, refine, draws) for _ in range(self.TOGETHER)]
            # a narrower group may take more memory or time
            traded = [t for t in traded if budget.holds(cost(self.supernet, t))]
            if not traded:
                continue
            errors = self._errors(traded)
            best = traded[errors.index(min(errors))]  # on some of the images, so it has to prove itself on all
            if (found := self.score(best)) < error:
                widths, error = best, found
        return widths

    def _traded(self, widths: Widths, budget: Budget, refine: Refine, draws: random.Random) -> Widths:
        """Narrow one or two groups by a step or two, and widen others with what that sets free."""
        names = draws.sample(self.supernet.space.names, len(self.supernet.space))
        giving = draws.choice((1, 2))
        for name in names[:giving]:
            for _ in range(draws.choice((1, 2))):
                narrower = _narrower(self.supernet.space[name], widths[name], self.steps)
                widths = widths if narrower is None else widths.replaced(name, narrower)
        for exact in (False, True) if refine == "units" else (False,):
            widths = fill_budget(self.supernet, widths, budget, names[giving:] + names[:giving], exact=exact)
        return widths

    def step(self, budget: Budget) -> str:
        """Slim the group that costs least error, as far as the images tell, and return its name."""
        self.error = self._errors([self.widths])[0]  # on more images than before, perhaps
        waiting = sorted(self._candidates(budget), key=self._guess)
        best: tuple[tuple[float, float, int], _Candidate, float] | None = None
        while waiting and (best is None or self._guess(waiting[0]) < best[0]):
            unknown = sum(c.name not in self.rises for c in waiting)
            look = max(self.LOOK, unknown)
            now, waiting = waiting[:look], waiting[look:]
            for candidate, error in zip(now, self._errors([c.widths for c in now]), strict=True):
                rise = error - self.error
                self.rises[candidate.name] = rise / self._units(candidate)
                found = (self._key(candidate, rise), candidate, error)
                best = found if best is None or found[0] < best[0] else best
        assert best is not None
        self.widths, self.error = best[1].widths, best[2]
        return best[1].name

    def _promising(self, widths: Widths, changed: list[Widths]) -> list[Widths]:
        """Choose those whose error should be the least, by the rise that each unit had when it was last scored."""

        def guess(other: Widths) -> float:
            return sum(self.rises.get(n, 0.0) * (widths[n] - w) for n, w in other.items())

        return sorted(changed, key=guess)[: self.FILLING]

    def _errors(self, subnets: Sequence[Widths]) -> list[float]:
        return self.score.many(subnets, self._parts())

    def _parts(self) -> int:
        share = self.SHARE * self.whole / max(1, cost(self.supernet, self.widths).macs)
        return max(1, min(self.score.parts, round(share * self.score.parts)))

    def _units(self, candidate: _Candidate) -> int:
        return self.widths[candidate.name] - candidate.widths[candidate.name]

    def _guess(self, candidate: _Candidate) -> tuple[float, float, int]:
        """Order a candidate by the rise that it had when it was last scored; one that never was comes first."""
        return self._key(candidate, self.rises.get(candidate.name, -math.inf) * self._units(candidate))


def _saved(before: Cost, after: Cost, exceeded: tuple[tuple[str, float], ...]) -> float:
    """Return what a step saves of the limits that are exceeded: shares of them, added up in the first one's unit."""
    first = exceeded[0][1]
    return sum(float(getattr(before, unit) - getattr(after, unit)) * (first / limit) for unit, limit in exceeded)


def search(
    supernet: Supernet,
    budgets: Budgets,
    evaluate: Evaluate,
    *,
    mode: Mode = "fast",
    rank: Rank = "per_cost",
    steps: int | None = None,
    refine: Refine = "units",
    seed: int = 0,
    scores: Scores | None = None,
    team: Team | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> SearchResult:
    """Slim the supernet greedily down through every budget.

    Each step narrows the group by which the error rises least (AutoSlim, arXiv 1903.11728, algorithm 1). Candidates are
    scored with batch-statistics BatchNorm, so stale running statistics never enter.

    Args:
        supernet: a trained supernet.
        budgets: by unit (`UNITS`), a number, a text such as "500k", "300M" or "60%" (of the widest), or a list of
            them, each a budget of its own; or a list of texts such as "macs<=300M and params<=2M", where all limits
            of one text must hold for the network found.
        evaluate: called with a callable subnet (images (N, C, H, W) -> logits (N, K)); returns its error or loss on
            held-out images, lower is better. It must use the same images at every call. A `HeldOut` can be scored in
            parts, which the fast mode needs to save images; 8 to 16 parts are good.
        mode: "reference" scores every group at every step, on all held-out images, as published. "fast" finds about
            the same networks with less forward work: at every step it scores the few groups that promise most by what
            is known of them, on a part of the images, which grows as the subnets get cheaper. That is a tenth of the
            work or less with many groups and a `HeldOut`, a fifth with few groups, a third with any other callable.
        rank: "error" ranks candidates by error alone, as published; "per_cost" by the rise of the error for each
            unit of the budget saved.
        steps: the range of each group is walked in about this many steps; by default 10, as published (section 4), and
            5 in the fast mode, which looks at fewer images: larger steps stand out more from their noise.
        refine: how to fill what the descent leaves of a budget. In steps of whole divisors it stops up to a step of
            some group below its budget, so two networks found "at" one budget may differ by several per cent in cost
            and could not be compared. "units" widens groups to within 1 % of the budget where single units allow: on
            the `choices` of the space as far as these go, then with as few groups as possible off them. "choices" stays
            on the choices, for devices that want multiples of a divisor; "none" leaves the widths as they are. The
            descent goes on from the unrefined widths, so one descent still serves every budget; a refined network is
            kept only if its error is no higher. This scores at most 3 subnets for each group, and one more, for each
            budget. In the fast mode trades follow, about 3 for each group: a step or two less of one or two groups,
            chosen at random by `seed`, and more of others; each is kept if it lowers the error.
        seed: decides between candidates that are exactly equal, and what is traded.
        scores: a dict that is read before a subnet is scored, and gets what was scored. It holds plain data: kept in a
            file and given again, an interrupted search scores only what is missing, and comes to the same result.
        team: the processes that share the scoring, if there are several; the result does not depend on them. Budgets of
            latency then need a `SharedLatency` in `supernet.conditions`.
        on_step: called after every step.

    Raises:
        BudgetError: a budget is malformed or out of reach; nothing was evaluated then.
        ConfigError: another argument is unknown, of the wrong type or out of range.
        LatencyError: the team does not share its latency, or a prediction is no positive number.
        EvaluationError: evaluate raised or returned no finite number; the text names the widths. `scores` has what
            was scored before. Or `scores` was given what is no score.
        StaleStatisticsError: evaluate switched BatchNorm back to running statistics.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"got mode={mode!r}; needed: one of {list(get_args(Mode))}")
    if rank not in get_args(Rank):
        raise ConfigError(f"got rank={rank!r}; needed: one of {list(get_args(Rank))}")
    if refine not in get_args(Refine):
        raise ConfigError(f"got refine={refine!r}; needed: one of {list(get_args(Refine))}")
    steps = steps if steps is None else check_integer("steps", steps, ConfigError, also=" or None")
    if on_step is not None and not callable(on_step):
        raise ConfigError(f"got on_step={on_step!r}; needed: a callable that takes a Step, or None")
    draws = make_generator(seed)
    score = Scorer(supernet, evaluate, scores, team)
    ordered = read_budgets(supernet, budgets)
    ranks = torch.randperm(len(supernet.space), generator=draws).tolist()
    order = dict(zip(supernet.space.names, ranks, strict=True))
    kind = _FastDescent if mode == "fast" else _Descent
    descent = kind(supernet, score, rank, steps or kind.STEPS, order)
    units = dict.fromkeys(unit for budget in ordered for unit, _ in budget.limits)
    narrowest = supernet.space.min()
    networks: list[Found] = []
    trail: list[Step] = []
    for budget in ordered:
        while descent.widths != narrowest and not budget.holds(before := cost(supernet, descent.widths)):
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
                {unit: getattr(now, unit) for unit in units},
            )
            trail.append(made)
            if on_step is not None:
                on_step(made)
        widths = descent.refined(budget, refine)
        networks.append(Found.of(budget, widths, cost(supernet, widths), score(widths)))
    return SearchResult(tuple(networks), tuple(trail), score.evaluations, score.macs)
