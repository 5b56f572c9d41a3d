"""What a subnet costs, exactly and without a forward pass: functions of the widths that the trace gave."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from timm_autoslim.errors import BudgetError
from timm_autoslim.tracing.graph import ChannelGraph

if TYPE_CHECKING:
    from timm_autoslim.space import SearchSpace, Widths
    from timm_autoslim.supernet import Supernet


@dataclass(frozen=True)
class Cost:
    """Cost of one subnet.

    Attributes:
        macs: multiply-adds of convolutions and matrix products for one image in eval mode; one MAC is one multiply-add;
            no bias, normalisation, activation or pooling (the counting rule of arXiv 1903.11728's tables, less the
            final average pool that its authors add).
        params: number of parameters.
    """

    macs: int
    params: int


def cost_of(graph: ChannelGraph, widths: Sequence[int]) -> Cost:
    """Return the cost of a graph at these widths, one for each group."""
    macs = graph.macs(widths)
    lengths: dict[str, dict[int, int]] = defaultdict(dict)
    for (name, axis), count in graph.lengths.items():
        lengths[name][axis] = count(widths)
    params = 0
    for name in graph.parameters:
        shape = graph.shapes[name]
        params += prod(lengths[name].get(axis, n) for axis, n in enumerate(shape)) if name in lengths else prod(shape)
    return Cost(round(macs), params)


def cost(supernet: Supernet, widths: Widths | None = None) -> Cost:
    """Return the cost of a subnet (the widest if no widths are given), without running it.

    Raises:
        WidthError: the widths are of another model.
    """
    space = supernet.space
    return cost_of(supernet.graph, space.check(widths if widths is not None else space.max()).values_)


def cost_by_module(supernet: Supernet, widths: Widths | None = None) -> dict[str, int]:
    """Return the MACs of every module that multiplies, in the order of execution."""
    values = supernet.space.check(widths if widths is not None else supernet.space.max()).values_
    macs: dict[str, float] = defaultdict(float)
    for product in supernet.graph.products:
        macs[product.path] += product.constant * prod(c(values) for c in product.counts)
    return {path: round(m) for path, m in macs.items()}


@dataclass(frozen=True)
class Reach:
    """How far a model can be slimmed.

    Attributes:
        whole, half, narrowest: cost with every group at its size, at half of it (rounded down), and at its narrowest.
        held: what keeps the MACs at half width above the ideal quarter: reason (numbers in paths are `*`), and its
            share of the whole's MACs; the largest first.
    """

    whole: Cost
    half: Cost
    narrowest: Cost
    held: tuple[tuple[str, float], ...]


def reach(supernet: Supernet) -> Reach:
    """Return how far a model can be slimmed, whatever limits its search space has."""
    graph = supernet.graph
    half = [max(1, n // 2) for n in graph.group_sizes]
    whole = cost(supernet)
    held: dict[str, float] = defaultdict(float)
    for product in graph.products:
        left = prod(c(half) for c in product.counts) - prod(c(graph.group_sizes) for c in product.counts) / 4
        reason = product.held or f"{product.path}: one side of the product is no channel"
        held[re.sub(r"(?<=\.)\d+(?=[.:])", "*", reason)] += product.constant * left / whole.macs
    ranked = sorted(((r, share) for r, share in held.items() if share > 0), key=lambda item: -item[1])
    return Reach(whole, cost_of(graph, half), cost_of(graph, graph.floors), tuple(ranked))


UNITS = ("macs", "params")
_SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


def parse_budget(budget: float | str, whole: float) -> float:
    """Return a budget as a number: 300e6, "300M", "1.2G", or "60%" of `whole`.

    Raises:
        BudgetError: the text is no budget, or the number is not positive.
    """
    number: float
    try:
        if isinstance(budget, str):
            text = budget.strip()
            if text.endswith("%"):
                number = float(text[:-1]) / 100 * whole
            else:
                scale = _SUFFIXES.get(text[-1:], 1.0)
                number = float(text[:-1] if scale != 1.0 else text) * scale
        else:
            number = float(budget)
    except (TypeError, ValueError):
        raise BudgetError(f'got the budget {budget!r}; needed: a number, "300M", "1.2G" or "60%"') from None
    if not 0 < number < float("inf"):
        raise BudgetError(f"got the budget {budget!r}; needed: a positive number")
    return number


def check_unit(unit: str) -> str:
    """Return `unit`, or raise BudgetError if there is no such cost."""
    if unit not in UNITS:
        raise BudgetError(f"got a budget in {unit!r}; needed: one of {list(UNITS)}")
    return unit


def check_reach(space: SearchSpace, graph: ChannelGraph, unit: str, budget: float) -> None:
    """Raise BudgetError if not even the narrowest subnet meets the budget; say what it reaches."""
    narrowest = float(getattr(cost_of(graph, space.min().values_), unit))
    if budget < narrowest:
        whole = float(getattr(cost_of(graph, space.max().values_), unit))
        raise BudgetError(
            f"the budget of {budget:,.0f} {unit} is out of reach: the narrowest subnet of the search space has "
            f"{narrowest:,.0f} ({narrowest / whole:.1%} of the whole); raise the budget, or lower `min` in convert()"
        )


def uniform_at(supernet: Supernet, unit: str, budget: float | str) -> Widths:
    """Return the widths of the widest uniform multiplier whose cost is at most the budget, rounded to single units.

    The divisor is left out of account, so that uniform slimming, the baseline of every search, uses its budget up.

    Raises:
        BudgetError: the budget is malformed, of an unknown unit, or not even the narrowest meets it.
    """
    check_unit(unit)
    space, graph = supernet.space, supernet.graph
    number = parse_budget(budget, getattr(cost(supernet), unit))
    check_reach(space, graph, unit, number)
    low, high = 0.0, 1.0
    if getattr(cost_of(graph, space.max().values_), unit) <= number:
        return space.max()
    for _ in range(40):  # the cost is monotone in the multiplier
        middle = (low + high) / 2
        if getattr(cost_of(graph, space.uniform(middle, exact=True).values_), unit) <= number:
            low = middle
        else:
            high = middle
    return space.uniform(low, exact=True) if low > 0 else space.min()
