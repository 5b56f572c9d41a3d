"""Questions about sizes that a forward asks, and that must have the same answer in every subnet.

A subnet with another answer would take another path. Where all wide subnets have the answer of the widest, the narrower
ones are left out; else the channels stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from timm_autoslim.tracing.formulas import AttributeFormula, Count
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import Vector
from timm_autoslim.tracing.origins import FromAttribute, FromDimension, get_plain, list_leaves
from timm_autoslim.tracing.watching import Check

_MAX_CHOICES = 4096  # of the widths of several groups; of more, so many are drawn


@dataclass(frozen=True, eq=False)
class _Leaf:
    """A size that a check depends on.

    Attributes:
        formula: its value as a function of the widths.
        count: how many of the channels that it counts are active.
        vectors: these channels.
    """

    formula: Count | AttributeFormula
    count: Count
    vectors: tuple[Vector, ...]


def keep_answers(graph: ChannelGraph, checks: Sequence[Check]) -> ChannelGraph:
    """Return a graph in which every subnet answers the checks as the widest does."""
    for check in checks:
        for _ in range(8):  # it may ask about several sizes
            leaves = _find_leaves(graph, check)
            if not leaves:
                break
            least = _find_least(graph, check, leaves)
            largest = max(leaves.values(), key=lambda leaf: (leaf.count(graph.group_sizes), -leaf.count.fixed))
            reason = f"the code asks about their number at {check.where}"
            if least is not None:
                graph = graph.keep_width(largest.vectors[0], least, reason)
                break
            graph = graph.freeze(largest.vectors, f"{reason}, and takes another path if it is smaller")
    return graph


def _find_leaves(graph: ChannelGraph, check: Check) -> Mapping[int, _Leaf]:
    """Return by id those sizes that a check depends on and that can shrink."""
    leaves: dict[int, _Leaf] = {}
    for size in list_leaves(check.inputs):
        if isinstance(size.origin, FromDimension):
            count = graph.make_count(size.origin.vector)
            leaf = _Leaf(count, count, (size.origin.vector,))
        elif isinstance(size.origin, FromAttribute) and (formula := graph.attributes.get(size.origin.path)) is not None:
            path, uses = size.origin.path, (*graph.observations.attributes, *graph.observations.descriptions)
            vectors = [use.vector for use in uses if use.path == path and use.vector is not None]
            leaf = _Leaf(formula, formula.count, tuple(vectors))
        else:
            continue
        if leaf.count.terms:
            leaves[id(size)] = leaf
    return leaves


def _find_least(graph: ChannelGraph, check: Check, leaves: Mapping[int, _Leaf]) -> int | None:
    """Return the least width of the one group that decides a check from which on the answer stays.

    It is None if several groups decide it, or if more than half of the widths would be lost.
    """
    groups = sorted({group for leaf in leaves.values() for group, _ in leaf.count.terms})
    sizes = [graph.group_sizes[group] for group in groups]
    widths = list(graph.group_sizes)

    def answers_alike(choice: Iterable[int]) -> bool:
        for group, width in zip(groups, choice, strict=True):
            widths[group] = width
        values = {key: leaf.formula(widths) for key, leaf in leaves.items()}
        return bool(check.find_answer(lambda size: values.get(id(size), get_plain(size))) == answer)

    answer = check.find_answer(get_plain)
    if len(groups) == 1:
        least = next((n + 1 for n in range(sizes[0] - 1, 0, -1) if not answers_alike([n])), 1)
        return least if least <= max(1, sizes[0] // 2) else None
    return 1 if all(map(answers_alike, _choose_widths(sizes))) else None


def _choose_widths(sizes: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield widths of several groups: all that there are, or as many as can be tried."""
    if prod(sizes) <= _MAX_CHOICES:
        yield from itertools.product(*(range(1, n + 1) for n in sizes))
        return
    for index, n in enumerate(sizes):
        yield from ([*sizes[:index], width, *sizes[index + 1 :]] for width in range(1, n + 1))
    rng = np.random.default_rng(0)
    for _ in range(_MAX_CHOICES):
        yield rng.integers(1, np.array(sizes) + 1).tolist()
