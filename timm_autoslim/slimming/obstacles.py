"""Why a budget is out of reach: which rules of the search space to change, with values that were counted to do."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.errors import WidthError
from timm_autoslim.slimming.budgets import Budget
from timm_autoslim.supernet.rules import DEFAULT_MIN, FROZEN, build_space, read_share
from timm_autoslim.supernet.space import SearchSpace
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.utils.arguments import as_integer

_LEAST = 0.0001  # a share that is less than one channel: the least width that the model can run with
_SHARES = (*(percent / 100 for percent in range(99, 0, -1)), 0.001, _LEAST)
_DIVISORS = (64, 32, 16, 8, 4, 2, 1)
_MOST = 4  # remedies that are told
_FLAGS = {"min": "--min-width", "divisor": "--divisor", "choices": "--choices"}
_HINTS = {
    "min": "a lower `min` (--min-width)",
    "divisor": "a lower `divisor` (--divisor)",
    "choices": "lower `choices` (--choices)",
    "freeze": "less in `freeze` (--freeze)",
}


def describe_remedy(supernet: Supernet, budget: Budget, metric: str) -> str:
    """Return what would bring the narrowest subnet within a budget, as advice.

    Every remedy with a value was tried: the search space that `convert` would make was built, and its narrowest subnet
    counted. Memory and latency need not be the least there, so budgets of them get hints without values.

    Args:
        supernet: whose narrowest subnet is above the budget.
        budget: the budget.
        metric: of the limit that the narrowest subnet is above.
    """
    trial = _Trial(supernet.graph, supernet.space, budget)
    if not all(METRICS[name].grows for name in budget.metrics):
        hints = [text for rule, text in _HINTS.items() if trial.binds([rule])]
        if not hints and trial.binds(["min", "divisor"]):
            hints = ["a lower `min` and `divisor` together (--min-width, --divisor)"]
        return "raise the budget" + (f"; may help: {', '.join(hints)}" if hints else "")
    texts = _list_single(trial, metric)[:_MOST] or _list_joint(trial)
    if texts:
        return ", ".join(["raise the budget", *texts[:-1], f"or {texts[-1]}"])
    least = _describe_least(trial)
    return f"raise the budget: {least}; `inspect` names what is fixed" if least else "raise the budget"


@dataclass(frozen=True)
class _Change:
    """Another value of one argument of `convert`.

    Attributes:
        rule: the argument: min, divisor, choices or freeze.
        value: the value; of freeze, the globs that are left out.
        text: what the user has to do.
    """

    rule: str
    value: Any
    text: str


@dataclass(frozen=True)
class _Trial:
    """Counts what a budget's metrics are in the narrowest subnet under changed rules."""

    graph: ChannelGraph
    space: SearchSpace
    budget: Budget

    @property
    def frozen(self) -> tuple[str, ...]:
        """The globs by which the user froze channels."""
        before, _, after = FROZEN.partition("{}")
        reasons = dict.fromkeys(reason for _, reason in self.graph.observations.frozen_vectors)
        return tuple(r.removeprefix(before).removesuffix(after) for r in reasons if r.startswith(before))

    def build(self, changes: Sequence[_Change]) -> tuple[ChannelGraph, SearchSpace]:
        """Return the graph and the search space that `convert` would make with these changes.

        Raises:
            WidthError: it would refuse them.
        """
        values = {change.rule: change.value for change in changes}
        globs = values.pop("freeze", ())
        graph = self.graph.unfreeze([FROZEN.format(glob) for glob in globs]) if globs else self.graph
        return graph, build_space(graph, **{**self.space.rules, **values})

    def count(self, changes: Sequence[_Change]) -> dict[str, int] | None:
        """Return MACs and parameters of the narrowest subnet under these changes; None if `convert` refuses them."""
        try:
            graph, space = self.build(changes)
        except WidthError:
            return None
        widths = space.min().values_
        return {"macs": graph.macs(widths), "params": graph.params(widths)}

    def fits(self, changes: Sequence[_Change]) -> bool:
        """Whether the narrowest subnet is within the budget under these changes."""
        counts = self.count(changes)
        return counts is not None and all(counts[metric] <= limit for metric, limit in self.budget.limits)

    def find_first(self, ladder: Sequence[_Change], others: Sequence[_Change] = ()) -> _Change | None:
        """Return the first change of a ladder, from wide to narrow, that does together with others."""
        index = bisect.bisect_left(ladder, True, key=lambda change: self.fits([change, *others]))
        return ladder[index] if index < len(ladder) and self.fits([ladder[index], *others]) else None

    def binds(self, rules: Sequence[str]) -> bool:
        """Whether the narrowest subnet would be another one if these rules, and no others, were as low as can be."""
        ladders = [[ladder for ladder in _list_ladders(self, rule) if ladder] for rule in rules]
        changes = [of_rule[-1][-1] for of_rule in ladders if of_rule]
        return bool(changes) and self.count(changes) not in (self.count(()), None)


def _list_single(trial: _Trial, metric: str) -> list[str]:
    """Return the changes of one rule that do alone; of the values of a rule, the one that changes least."""
    texts: list[str] = []
    for rule in _HINTS:
        ladders, before = list(_list_ladders(trial, rule)), len(texts)
        for index, ladder in enumerate(ladders):
            if index and index == len(ladders) - 1 and len(texts) > before:
                break  # the last ladder is for all globs together: not needed where less does
            if change := trial.find_first(ladder):
                counts = trial.count([change])
                more = f": {counts[metric]:,} is possible then" if rule == "freeze" and counts else ""
                texts.append(change.text + more)
    return texts


def _list_joint(trial: _Trial) -> list[str]:
    """Return the fewest changes of several rules that do together; empty if all together do not."""
    ladders = {rule: list(_list_ladders(trial, rule))[-1:] for rule in ("min", "choices", "divisor", "freeze")}
    usable = {rule: of_rule[0] for rule, of_rule in ladders.items() if of_rule and of_rule[0]}
    for number in range(2, len(usable) + 1):
        for first, *others in combinations(usable, number):
            fixed = [_leave_choices() if rule == "choices" else usable[rule][-1] for rule in others]
            if change := trial.find_first(usable[first], fixed):
                return [" and ".join(c.text for c in (change, *fixed))]
    return []


def _leave_choices() -> _Change:
    return _Change("choices", None, "leave out `choices` (--choices)")


def _list_ladders(trial: _Trial, rule: str) -> Iterator[list[_Change]]:
    """Yield the changes of a rule, each list from wide to narrow: of every glob, and last of all groups."""
    if rule == "freeze":
        for glob in trial.frozen:
            yield [_Change(rule, (glob,), f"take {glob!r} out of `freeze` (--freeze)")]
        if len(trial.frozen) > 1:
            globs = " and ".join(map(repr, trial.frozen))
            yield [_Change(rule, trial.frozen, f"take {globs} out of `freeze` (--freeze)")]
        return
    value = trial.space.rules.get(rule)
    if isinstance(value, Mapping) and not value:  # no rule: the recipes' `--choices` when it is not given
        value = None
    if isinstance(value, Mapping):
        for glob, of_glob in value.items():
            values = _list_values(trial, rule, of_glob)
            yield [
                _Change(rule, {**value, glob: _set(rule, of_glob, v)}, _write(rule, v, f" of {glob!r}")) for v in values
            ]
        if rule == "choices":
            yield [_leave_choices()]
        else:
            every = _SHARES if rule == "min" else _list_values(trial, rule, None)
            yield [_Change(rule, v, f"set `{rule}` to {v:g} for all groups") for v in every]
    else:
        values = _list_values(trial, rule, value)
        yield [_Change(rule, _set(rule, value, v), _write(rule, v, adapted=value is None)) for v in values]


def _list_values(trial: _Trial, rule: str, value: Any) -> list[float]:
    """Return values below that of a rule, the largest first: in its form, a number of channels or a share."""
    if rule == "divisor":
        now = max(group.divisor for group in trial.space.groups) if value is None else value
        return [divisor for divisor in _DIVISORS if divisor < now]
    if rule == "choices" and value is None:
        return []
    amounts = list(value) if rule == "choices" else [DEFAULT_MIN if value is None else value]
    if not amounts:  # an iterator, which convert() has used up
        return []
    numbers = [number for one in amounts if (number := as_integer(one)) is not None]
    if len(numbers) == len(amounts):
        floor = max(trial.graph.floors)  # `convert` refuses a number of channels that a group cannot have
        return [*range(min(numbers) - 1, floor - 1, -1), _LEAST]
    shares = [share for one in amounts if (share := read_share(one)) is not None]
    return [share for share in _SHARES if share < min(shares)]


def _set(rule: str, value: Any, number: float) -> Any:
    """Return a rule's value with another number: the choices with one more, or the number itself."""
    return [number, *value] if rule == "choices" else number


def _write(rule: str, number: float, where: str = "", adapted: bool = False) -> str:
    """Say which number to give for a rule."""
    flag = "" if where else f" ({_FLAGS[rule]})"
    if rule == "choices":
        return f"begin `choices`{where} at {number:g}{flag}"
    if rule == "divisor":  # the default is another one in each group
        return f"{'set' if adapted else 'lower'} `divisor`{where} to {number:g}{flag}"
    return f"lower `min`{where} to {number:g}" + (flag if number < 1 else "")


def _describe_least(trial: _Trial) -> str:
    """Say what the least width of every group costs, with nothing frozen by the user; empty if that is not too much."""
    free = trial.graph.unfreeze([FROZEN.format(glob) for glob in trial.frozen])
    counts = {"macs": free.macs(free.floors), "params": free.params(free.floors)}
    above = [f"{counts[metric]:,} {metric}" for metric, limit in trial.budget.limits if counts[metric] > limit]
    return f"with the least width of every group there are {' and '.join(above)}" if above else ""
