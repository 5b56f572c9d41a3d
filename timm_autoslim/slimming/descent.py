"""The greedy descent (AutoSlim, arXiv 1903.11728, section 3), as published and faster: the modes of a search."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from timm_autoslim.slimming.candidates import RANKINGS, Candidate, list_candidates
from timm_autoslim.slimming.goals import Goal, find_subnet
from timm_autoslim.slimming.refinement import fill_by_loss, trade
from timm_autoslim.slimming.scoring import Scorer
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.utils.tables import Table


class Descent:
    """A descent as published: every step scores one step of every group, on all held-out images.

    Attributes:
        widths, loss: where the descent is.
    """

    STEPS = 10  # of the range of each group; section 4

    def __init__(
        self, supernet: Supernet, score: Scorer, rank: str, steps: int | None, order: Mapping[str, int]
    ) -> None:
        """Start at the widest subnet.

        Args:
            supernet: the supernet.
            score: scores subnets.
            rank: a key of `RANKINGS`.
            steps: the range of each group is walked in about this many steps; None is `STEPS`.
            order: decides between candidates that are exactly equal, by group.
        """
        self.supernet, self.score, self.rank, self.order = supernet, score, RANKINGS[rank], order
        self.steps = self.STEPS if steps is None else steps
        self.widths = supernet.space.max()
        self.loss = self._score([self.widths])[0]

    def step(self, goal: Goal) -> str:
        """Slim the group that raises the loss least, and return its name."""
        candidates = list_candidates(goal, self.widths, self.steps)
        losses = self._score([c.widths for c in candidates])
        best = min(zip(candidates, losses, strict=True), key=lambda pair: self._key(pair[0], pair[1] - self.loss))
        self.widths, self.loss = best[0].widths, best[1]
        return best[0].name

    def refine(self, goal: Goal, passes: Sequence[bool]) -> Widths:
        """Widen groups into what the descent left of the budget, and return the best subnet met on the way.

        The descent itself stays where it is.
        """
        start = self.widths
        if not goal.holds(start):  # the descent ended at the narrowest, which does not take the least memory or time
            start = find_subnet(goal)
        subnets = [start, *fill_by_loss(goal, start, passes, self._select, self._score)]
        # wider first: the descent's own subnet stands only where it is truly better
        return min(reversed(subnets), key=self.score)

    def _score(self, subnets: Sequence[Widths]) -> list[float]:
        return self.score.many(subnets)

    def _select(self, widths: Widths, changes: list[Widths]) -> list[Widths]:
        """Choose which of these changes of the widths to score."""
        return changes

    def _key(self, candidate: Candidate, rise: float) -> tuple[float, float, int]:
        """Order candidates, the best first, by how much they raise the loss."""
        return self.rank(rise, candidate.saved), -candidate.saved, self.order[candidate.name]


class FastDescent(Descent):
    """A descent that scores few candidates on few images.

    The rise of the loss that a step of a group caused when it was last scored is a good guess of what it causes now. So
    candidates are scored in the order of this guess, and only until none that is left promises more than the best of
    those that were scored (lazy greedy; Minoux, 1978). The images are as many as make the work of one score the same
    all the way down: a share of `SHARE` for the widest, all of them for a subnet of that share of its MACs.

    A descent never takes a step back, so a refinement ends with trades at the budget, which do.
    """

    STEPS = 5  # larger than published, to stand out from the noise of fewer images
    LOOK = 2  # candidates that are scored together
    FILLING = 6  # candidates that are scored in each round of filling a budget
    SHARE = 3 / 16  # of the held-out images, for the widest
    TRADES = 3  # of the widths of two or three groups, for each group
    TOGETHER = 6  # trades that are scored together, of which the best is made if it lowers the loss

    def __init__(
        self, supernet: Supernet, score: Scorer, rank: str, steps: int | None, order: Mapping[str, int]
    ) -> None:
        self.rises: dict[str, float] = {}  # by group: rise of the loss for each step of its width by 1, as last scored
        super().__init__(supernet, score, rank, steps, order)

    def step(self, goal: Goal) -> str:
        """Slim the group that raises the loss least, as far as the images tell, and return its name."""
        self.loss = self._score([self.widths])[0]  # on more images than before, perhaps
        waiting = sorted(list_candidates(goal, self.widths, self.steps), key=self._guess)
        best: tuple[tuple[float, float, int], Candidate, float] | None = None
        while waiting and (best is None or self._guess(waiting[0]) < best[0]):
            new = sum(c.name not in self.rises for c in waiting)
            look = max(self.LOOK, new)
            now, waiting = waiting[:look], waiting[look:]
            for candidate, loss in zip(now, self._score([c.widths for c in now]), strict=True):
                rise = loss - self.loss
                self.rises[candidate.name] = rise / self._difference(candidate)
                scored = (self._key(candidate, rise), candidate, loss)
                best = scored if best is None or scored[0] < best[0] else best
        assert best is not None
        self.widths, self.loss = best[1].widths, best[2]
        return best[1].name

    def refine(self, goal: Goal, passes: Sequence[bool]) -> Widths:
        """Fill the budget, then trade width between groups as long as that lowers the loss."""
        widths = super().refine(goal, passes)
        if not passes:
            return widths
        loss = self.score(widths)
        draws = random.Random(repr(self.order))  # the order is drawn by the seed; every budget trades alike
        for _ in range(math.ceil(self.TRADES * len(self.supernet.space) / self.TOGETHER)):
            trades = [trade(goal, widths, passes, self.steps, draws) for _ in range(self.TOGETHER)]
            trades = [t for t in trades if goal.holds(t)]  # a narrower group may take more memory or time
            if not trades:
                continue
            losses = self._score(trades)
            best = trades[losses.index(min(losses))]  # on some of the images, so it has to prove itself on all
            if (exact := self.score(best)) < loss:
                widths, loss = best, exact
        return widths

    def _select(self, widths: Widths, changes: list[Widths]) -> list[Widths]:
        """Choose those whose loss should be the least, by the rise that each group had when it was last scored."""

        def guess(other: Widths) -> float:
            return sum(self.rises.get(name, 0.0) * (widths[name] - width) for name, width in other.items())

        return sorted(changes, key=guess)[: self.FILLING]

    def _score(self, subnets: Sequence[Widths]) -> list[float]:
        macs = self.supernet.graph.macs
        share = self.SHARE * macs(self.supernet.space.max().values_) / max(1, macs(self.widths.values_))
        return self.score.many(subnets, max(1, min(self.score.parts, round(share * self.score.parts))))

    def _difference(self, candidate: Candidate) -> int:
        return self.widths[candidate.name] - candidate.widths[candidate.name]

    def _guess(self, candidate: Candidate) -> tuple[float, float, int]:
        """Order a candidate by the rise that it had when it was last scored; one that never was comes first."""
        return self._key(candidate, self.rises.get(candidate.name, -math.inf) * self._difference(candidate))


MODES: Table[type[Descent]] = Table("mode")
"""Modes of the search by name: how a descent scores its candidates, and how it refines a network."""
MODES.add("fast")(FastDescent)
MODES.add("reference")(Descent)
