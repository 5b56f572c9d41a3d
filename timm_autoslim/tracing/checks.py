"""Questions about sizes that a forward asks, and that must have the same answer in every subnet.

A subnet with another answer would take another path. Where all wide subnets have the answer of the widest, the narrower
ones are left out; else the channels stay.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from timm_autoslim.tracing.bounds import Bounds, Formula
from timm_autoslim.tracing.formulas import Count
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import Vector
from timm_autoslim.tracing.origins import (
    FromAttribute,
    FromDimension,
    FromExpression,
    Number,
    list_leaves,
    strip_origin,
)
from timm_autoslim.tracing.sizes import Integer
from timm_autoslim.tracing.watching import Check

_MAX_CHOICES = 4096  # of the widths of several groups; where there are more, and no bounds tell, a group is fixed


@dataclass(frozen=True, eq=False)
class _Leaf:
    """A size that a check depends on.

    Attributes:
        formula: its value as a function of the widths.
        count: how many of the channels that it counts are active.
        vectors: these channels.
    """

    formula: Formula
    count: Count
    vectors: tuple[Vector, ...]


def keep_answers(graph: ChannelGraph, checks: Sequence[Check]) -> ChannelGraph:
    """Return a graph in which every subnet answers the checks as the widest does.

    Where several groups decide an answer together, the larger ones are fixed first, until the answer stays.
    """
    space = _Space(graph)
    for check in checks:
        while leaves := space.find_leaves(check):
            question = check.compute, *(_describe(number, leaves) for number in check.inputs)
            if question in space.answered:
                break
            least = _find_least(space.graph, check, leaves)
            if least is not None:
                space.answered.add(question)
                if least > 1:
                    largest = _find_largest(space.graph, leaves).vectors[0]
                    space.graph = space.graph.keep_width(largest, least, check.reason)
                break
            vectors = _find_largest(space.graph, leaves).vectors
            space = _Space(space.graph.freeze(vectors, check.reason + check.consequence))
    return space.graph


def list_size_checks(graph: ChannelGraph) -> list[Check]:
    """Return the questions whether attributes that are smaller than the number of channels they follow stay above 0."""
    checks = []
    for path, formula in graph.attributes.items():
        if formula.power == 1 and formula.value < formula.length:
            reason = f"the attribute {path}, now {formula.value}, shrinks with their number, and would become 0"
            number = Integer(int(formula.value), FromAttribute(path))
            checks.append(Check(bool, (number,), reason, consequence=""))
    return checks


class _Space:
    """The widths of a graph, and the sizes that follow from them.

    Attributes:
        graph: it gets least widths; with other groups, it is another space.
        answered: questions whose answer stays.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph, self.answered = graph, set[Any]()
        self._leaves: dict[Any, _Leaf] = {}  # by attribute, or by id of the channels
        self._vectors: dict[str, list[Vector]] = {}  # by attribute
        for use in (*graph.observations.attributes, *graph.observations.descriptions):
            if use.vector is not None:
                self._vectors.setdefault(use.path, []).append(use.vector)

    def find_leaves(self, check: Check) -> dict[int, _Leaf]:
        """Return by id those sizes that a check depends on and that can shrink."""
        leaves = {id(size): self._find_leaf(size) for size in list_leaves(check.inputs)}
        return {key: leaf for key, leaf in leaves.items() if leaf is not None and leaf.count.terms}

    def _find_leaf(self, size: Number) -> _Leaf | None:
        origin = size.origin
        key = id(origin.vector) if isinstance(origin, FromDimension) else origin
        if key not in self._leaves:
            if isinstance(origin, FromDimension):
                count = self.graph.make_count(origin.vector)
                self._leaves[key] = _Leaf(count, count, (origin.vector,))
            elif isinstance(origin, FromAttribute) and origin.path in self.graph.attributes:
                formula = self.graph.attributes[origin.path]
                self._leaves[key] = _Leaf(formula, formula.count, tuple(self._vectors[origin.path]))
            else:
                return None
        return self._leaves[key]


def _find_largest(graph: ChannelGraph, leaves: Mapping[int, _Leaf]) -> _Leaf:
    """Return the size that is largest at the widest."""
    return max(leaves.values(), key=lambda leaf: (leaf.count(graph.group_sizes), -leaf.count.fixed))


def _describe(number: Any, leaves: Mapping[int, _Leaf]) -> Any:
    """Return a number as a function of the widths; two that are equal are the same function."""
    if not isinstance(number, Number):
        return number
    if isinstance(number.origin, FromExpression):
        return number.origin.compute, *(_describe(value, leaves) for value in number.origin.inputs)
    return leaves[id(number)].formula if id(number) in leaves else strip_origin(number)


def _find_least(graph: ChannelGraph, check: Check, leaves: Mapping[int, _Leaf]) -> int | None:
    """Return the least width of the one group that decides a check from which on the answer stays.

    Where several groups decide it, it is that of the largest size. It is None if more than three quarters of the widths
    would be lost, or if it is not known that the answer stays.
    """
    sizes = graph.group_sizes
    formulas = {key: leaf.formula for key, leaf in leaves.items()}
    if Bounds(formulas, list(zip(graph.floors, sizes, strict=True))).is_constant(check.compute, check.inputs):
        return 1
    groups = sorted({group for leaf in leaves.values() for group, _ in leaf.count.terms})
    widths = list(sizes)

    def answers_alike(choice: Iterable[int]) -> bool:
        for group, width in zip(groups, choice, strict=True):
            widths[group] = width
        values = {key: formula(widths) for key, formula in formulas.items()}
        return bool(check.find_answer(lambda size: values.get(id(size), strip_origin(size))) == answer)

    answer = check.find_answer(strip_origin)
    if len(groups) == 1:
        size = sizes[groups[0]]
        least = next((n + 1 for n in range(size - 1, 0, -1) if not answers_alike([n])), 1)
        return least if least <= size - size // 4 else None
    apart = _find_least_apart(graph, check, formulas, _find_largest(graph, leaves).count)
    if apart is not None or prod(sizes[group] for group in groups) > _MAX_CHOICES:
        return apart
    return 1 if all(map(answers_alike, itertools.product(*(range(1, sizes[g] + 1) for g in groups)))) else None


def _find_least_apart(graph: ChannelGraph, check: Check, formulas: Mapping[int, Formula], largest: Count) -> int | None:
    """Return the least width of the largest size's group from which on the answer stays, whatever the others are.

    So a stage stays wider than the one before, where the code asks whether both are equal. It is None if more than
    three quarters of the widths would be lost, or if several groups decide the largest size.
    """
    if len(largest.terms) != 1:
        return None
    group, bounds = largest.terms[0][0], list(zip(graph.floors, graph.group_sizes, strict=True))
    floor, size = bounds[group]

    def stays(least: int) -> bool:
        widths = [*bounds[:group], (least, size), *bounds[group + 1 :]]
        return Bounds(formulas, widths).is_constant(check.compute, check.inputs)

    candidates = range(floor + 1, size - size // 4 + 1)
    index = bisect.bisect_left(candidates, True, key=stays)
    return candidates[index] if index < len(candidates) else None
