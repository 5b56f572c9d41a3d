"""How far a model can be slimmed, and what stands in the way."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from math import prod

from timm_autoslim.costs.cost import Cost, check_supernet
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.tracing.graph import ChannelGraph


@dataclass(frozen=True)
class Reach:
    """How far a model can be slimmed.

    Attributes:
        widest, half, narrowest: cost with every group at its size, at half of it (rounded down), and at its narrowest.
        obstacles: why the MACs at half width are above the ideal quarter: reason (numbers in paths are `*`), and its
            share of the widest's MACs; the largest first.

    Example:
        >>> Reach(Cost(400, 40), Cost(120, 12), Cost(4, 1), (("stem: fixed by the images", 0.05),)).half.macs
        120
    """

    widest: Cost
    half: Cost
    narrowest: Cost
    obstacles: tuple[tuple[str, float], ...]


def reach(supernet: Supernet) -> Reach:
    """Return how far a model can be slimmed, whatever limits its search space has.

    Raises:
        ConfigError: the model is no supernet.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> limits = reach(supernet)
        >>> round(limits.half.macs / limits.widest.macs, 2)
        0.25
    """
    check_supernet(supernet)
    graph = supernet.graph
    widest, half = _count(graph, graph.group_sizes), [max(1, n // 2) for n in graph.group_sizes]
    obstacles: dict[str, float] = defaultdict(float)
    for product in graph.products:
        above = prod(c(half) for c in product.counts) - prod(c(graph.group_sizes) for c in product.counts) / 4
        reason = product.reason or f"{product.path}: multiplies by a length that is no channel count"
        obstacles[re.sub(r"(?<=\.)\d+(?=[.:])", "*", reason)] += product.constant * above / widest.macs
    largest = sorted(((r, share) for r, share in obstacles.items() if share > 0), key=lambda item: -item[1])
    return Reach(widest, _count(graph, half), _count(graph, graph.floors), tuple(largest))


def _count(graph: ChannelGraph, widths: list[int] | tuple[int, ...]) -> Cost:
    """Return MACs and parameters at widths that need not be in the search space."""
    return Cost(graph.macs(widths), graph.params(widths))
