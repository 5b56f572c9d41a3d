"""Sizes that a forward compares, and that must not become equal in a subnet: it would take another path there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timm_autoslim.tracing.formulas import Count
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import AttributeUse, Vector
from timm_autoslim.tracing.origins import FromAttribute, FromDimension, Number, find_leaves, is_proportional


@dataclass(frozen=True)
class _Range:
    """The values that a size can have: from `low` to what it is at the widest, and the channels that it counts."""

    low: int
    groups: frozenset[int]
    proportional: bool
    vectors: tuple[Vector, ...]


def find_coincidences(
    graph: ChannelGraph, inequalities: Sequence[tuple[Number, Number]], uses: Sequence[AttributeUse]
) -> list[Vector]:
    """Return channels that are to be fixed, so that no two sizes that differ at the widest are equal in a subnet.

    Of two sizes the larger one stays: the smaller one can only move away from it.

    Args:
        graph: the channel graph.
        inequalities: pairs of sizes, the smaller one first.
        uses: attributes with the channels that they count.
    """
    vectors: dict[int, Vector] = {}
    for small, large in inequalities:
        a, b = _find_range(graph, small, uses), _find_range(graph, large, uses)
        together = a.groups == b.groups and len(a.groups) == 1 and a.proportional and b.proportional
        if b.vectors and b.low <= int(small) and not together:
            vectors |= {id(vector): vector for vector in b.vectors}
    return list(vectors.values())


def _find_range(graph: ChannelGraph, size: Number, uses: Sequence[AttributeUse]) -> _Range:
    floors = graph.floors
    ranges = []
    leaves = list(find_leaves(size))
    for leaf in leaves:
        origin = leaf.origin
        of_leaf: list[Vector] = []
        count, low = Count(int(leaf), ()), int(leaf)
        if isinstance(origin, FromDimension):
            of_leaf, count = [origin.vector], graph.make_count(origin.vector)
            low = count(floors)
        elif isinstance(origin, FromAttribute) and origin.path in graph.attributes:
            of_leaf = [use.vector for use in uses if use.path == origin.path and use.vector is not None]
            formula = graph.attributes[origin.path]
            count, low = formula.count, int(formula(floors))
        groups = frozenset(group for group, _ in count.terms)
        ranges.append(_Range(low, groups, not count.fixed, tuple(of_leaf) if groups else ()))
    groups = frozenset[int]().union(*(r.groups for r in ranges))
    vectors = tuple(vector for r in ranges for vector in r.vectors)
    if not groups:
        return _Range(int(size), groups, False, ())
    if len(leaves) == 1 and is_proportional(size):
        return _Range(int(size) * ranges[0].low // max(1, int(leaves[0])), groups, ranges[0].proportional, vectors)
    return _Range(0, groups, False, vectors)
