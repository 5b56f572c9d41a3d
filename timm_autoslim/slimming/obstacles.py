"""Why a budget is out of reach: which rule of the search space binds, and with which value the budget could be met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from timm_autoslim.costs.conditions import Conditions
from timm_autoslim.costs.cost import count_cost
from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.supernet.convert import FROZEN
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import ChannelGroup
from timm_autoslim.tracing.graph import ChannelGraph

_SHARES = tuple(percent / 100 for percent in range(99, 0, -1))
_DIVISORS = (64, 32, 16, 8, 4, 2, 1)


def describe_remedy(supernet: Supernet, metric: str, limit: float, conditions: Conditions) -> str:
    """Return what would bring the narrowest subnet below a limit, as advice.

    Args:
        supernet: whose narrowest subnet is above the limit.
        metric: of the limit.
        limit: the limit.
        conditions: what memory and latency are counted for.
    """
    graph, space = supernet.graph, supernet.space
    rules, globs = _Rules(space.groups), _list_frozen(graph)
    if not METRICS[metric].grows:  # then the narrowest need not have the least, and a prediction may take long
        texts = [f"lower {text}" for text in rules.list_binding()] + ["freeze less (--freeze)"] * bool(globs)
        return " or ".join(("raise the budget", *texts))

    def fits(widths: Iterable[int]) -> bool:
        subnet = space.from_dict(dict(zip(space.names, widths, strict=True)))
        return count_cost(supernet, subnet, [metric], conditions).pick(metric) <= limit

    remedy = rules.find_values(fits) if fits(graph.floors) else _find_frozen(graph, globs, metric, limit)
    if remedy:
        return f"raise the budget, or {remedy}"
    least = _count_least(graph, globs, metric)
    return (
        f"raise the budget: with the least width of every group there are {least:,}; inspect(model) names what is fixed"
    )


class _Rules:
    """The rules of a search space, as they stand in its groups.

    Attributes:
        groups: the groups.
        chosen: names of the groups whose narrowest width is the user's choice.
    """

    def __init__(self, groups: Iterable[ChannelGroup]) -> None:
        self.groups = tuple(groups)
        self.chosen = [g.name for g in self.groups if g.choices[0] != _round_up(g, g.min, g.divisor)]

    def narrow(self, share: float = 1.0, divisor: int = 2**31, chosen: float = 1.0) -> list[int]:
        """Return the narrowest width of every group, were these the rules where they are lower than they are now.

        Args:
            share: of a group's size that it keeps at least, where the user chose no widths.
            divisor: of the widths, where the user chose none.
            chosen: share of a group's size that is the least choice, where the user chose.
        """
        widths = []
        for group in self.groups:
            if group.name in self.chosen:
                widths.append(min(group.choices[0], _take_share(group, chosen)))
            else:
                lowest = min(group.min, _take_share(group, share))
                widths.append(_round_up(group, lowest, min(divisor, group.divisor)))
        return widths

    def list_binding(self) -> list[str]:
        """Return the rules without which the narrowest subnet would be narrower."""
        now = self.narrow()
        texts = ["`min` in convert() (--min-width)"] if self.narrow(share=0.0) != now else []
        texts += ["`divisor` (--divisor)"] if self.narrow(divisor=1) != now else []
        return texts + (["the least of `choices` (--choices)"] if self.narrow(chosen=0.0) != now else [])

    def find_values(self, fits: Callable[[Iterable[int]], bool]) -> str:
        """Return the rules that would do with other values, one alone if there is one, or else together."""
        now = self.narrow()
        texts = []
        for share in _SHARES:
            if (widths := self.narrow(share=share)) != now and fits(widths):
                texts.append(f"lower `min` to {share:g} in convert() (--min-width)")
                break
        for divisor in _DIVISORS:
            if (widths := self.narrow(divisor=divisor)) != now and fits(widths):
                texts.append(f"lower `divisor` to {divisor} (--divisor)")
                break
        for share in _SHARES:
            if (widths := self.narrow(chosen=share)) != now and fits(widths):
                texts.append(f"begin `choices` (--choices) at {share:g} of a group's channels")
                break
        if texts:
            return " or ".join(texts)
        for share in (*_SHARES, 0.0):
            if fits(self.narrow(share, 1, share)):
                least = f"{share:g}" if share else "1 (one channel)"
                chosen = f", and begin `choices` at {'that share' if share else 'it'}" if self.chosen else ""
                return f"lower `min` to {least} and `divisor` to 1 (--min-width, --divisor){chosen}"
        return ""


def _take_share(group: ChannelGroup, share: float) -> int:
    return max(group.floor, round(share * group.size))


def _round_up(group: ChannelGroup, width: int, divisor: int) -> int:
    """Return the least width that is a multiple of the divisor, or else the group's size."""
    return min(-(-width // divisor) * divisor, group.size)


def _list_frozen(graph: ChannelGraph) -> list[str]:
    """Return the globs by which the user froze channels."""
    before, _, after = FROZEN.partition("{}")
    reasons = dict.fromkeys(reason for _, reason in graph.observations.frozen_vectors)
    return [reason.removeprefix(before).removesuffix(after) for reason in reasons if reason.startswith(before)]


def _count_least(graph: ChannelGraph, globs: Iterable[str], metric: str) -> int:
    """Return what the least widths of all groups cost, were the modules of these globs not frozen."""
    free = graph.unfreeze([FROZEN.format(glob) for glob in globs])
    return free.macs(free.floors) if metric == "macs" else free.params(free.floors)


def _find_frozen(graph: ChannelGraph, globs: Sequence[str], metric: str, limit: float) -> str:
    """Say which frozen modules keep even the least widths of all above a limit; empty if the model itself does."""
    least = {glob: _count_least(graph, [glob], metric) for glob in globs}
    texts = [
        f"{glob!r} out of `freeze` (--freeze): {count:,} is possible then"
        for glob, count in least.items()
        if count <= limit
    ]
    if texts:
        return f"take {', or '.join(texts)}"
    if _count_least(graph, globs, metric) <= limit:
        return f"freeze less (--freeze): without {globs} {_count_least(graph, globs, metric):,} is possible"
    return ""
