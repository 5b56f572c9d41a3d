"""Progress bars of a search: how far the descent has come, and how many subnets were scored."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from timm_autoslim.costs.cost import Cost
from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.slimming.budgets import Budget
from timm_autoslim.slimming.network import Step
from timm_autoslim.slimming.scoring import Scorer
from timm_autoslim.utils.bars import show_bar


class DescentBar:
    """How far a descent has come towards the smallest budgets, and what its last step did.

    Attributes:
        bar: tqdm's, of 100 per cent.
    """

    def __init__(self, widest: Cost, budgets: Sequence[Budget], *, shown: bool = True) -> None:
        bar_format = "{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
        self.bar = show_bar(desc="search", total=100, bar_format=bar_format, shown=shown)
        limits = [limit for budget in budgets for limit in budget.limits]
        self._goals = {
            metric: sorted({number for name, number in limits if name == metric}, reverse=True)
            for metric in dict.fromkeys(name for name, _ in limits)
        }
        self._widest = {metric: widest.pick(metric) for metric in self._goals}
        self._text, self._scores, self._since, self._shown = "the widest subnet", 0, 0, 0.0

    def count_score(self) -> None:
        """Count a score: after the last step of a budget its network is refined, which takes as long as the descent."""
        self._scores += 1
        now = time.monotonic()
        if now - self._shown > 0.5:
            self._shown = now
            self.bar.set_postfix_str(f"{self._text}; then {self._scores - self._since} scores")

    def show_step(self, step: Step) -> None:
        """Show one step."""
        shares, ahead = [], []
        for metric, goals in self._goals.items():
            now, start = step.spent[metric], self._widest[metric]
            shares.append(min(1.0, (start - now) / max(start - goals[-1], 1e-9)))
            ahead += [f"{now / goal - 1:+.1%} to {METRICS[metric].format(goal)}" for goal in goals if now > goal][:1]
        self.bar.n = round(100 * max(0.0, min(shares)), 1)  # a narrower subnet may be slower than the widest
        left = ", ".join(ahead) or "the last network is refined"
        self._text, self._since = f"{step.group} -> {step.width}, loss {step.loss:.4f}, {left}", self._scores
        self.bar.set_postfix_str(self._text)


@contextlib.contextmanager
def show_descent(scorer: Scorer, widest: Cost, budgets: Sequence[Budget], progress: bool) -> Iterator[DescentBar]:
    """Show a search while a block runs, in the first process of its team; without `progress` nothing."""
    bar = DescentBar(widest, budgets, shown=progress and not scorer.team.index)
    scorer.on_score = bar.count_score
    with bar.bar:
        yield bar


@contextlib.contextmanager
def show_scores(scorer: Scorer, text: str, progress: bool) -> Iterator[None]:
    """Count scores in a bar while a block runs, in the first process of a team; without `progress` in none."""
    with show_bar(desc=text, unit=" scores", shown=progress and not scorer.team.index) as bar:
        scorer.on_score = bar.update
        yield
