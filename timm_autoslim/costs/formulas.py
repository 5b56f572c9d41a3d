"""Numbers as functions of the widths: evaluated in bulk, and found again from the values that they had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import gcd
from typing import Any

from timm_autoslim.tracing.formulas import Area, Count, Row
from timm_autoslim.tracing.graph import ChannelGraph


def _reduced(numbers: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Return the numbers without their common divisor, and the divisor."""
    divisor = gcd(*numbers) or 1
    return tuple(n // divisor for n in numbers), divisor


class Solver:
    """Finds, for the values that a number had in all runs, a product of active lengths that had them."""

    def __init__(self, graph: ChannelGraph, runs: Sequence[Sequence[int]]) -> None:
        self.runs = runs
        self.lengths: list[Count] = list(dict.fromkeys(_counts(graph)))
        self.values = [tuple(c(w) for w in runs) for c in self.lengths]
        self._by_values = {_reduced(v)[0]: i for i, v in reversed(list(enumerate(self.values)))}
        self._known: dict[tuple[int, ...], Row | None] = {}

    def ambiguous(self) -> bool:
        """Whether two different lengths had the same values in all runs."""
        return len(self._by_values) < len({_proportions(c) for c in self.lengths})

    def solve(self, values: tuple[int, ...]) -> Row | None:
        """Return scale, divisor and factors of a number with these values, or None if there are none."""
        if values not in self._known:
            self._known[values] = self._solve(values)
        return self._known[values]

    def _solve(self, values: tuple[int, ...]) -> Row | None:
        if len(set(values)) == 1:
            return values[0], 1, ()
        shape, scale = _reduced(values)
        found = self._by_values.get(shape)
        if found is not None:
            return scale, _reduced(self.values[found])[1], (found,)
        for i, other in enumerate(self.values):  # a product of two lengths, or a sum
            if any(other) and all(o and v % o == 0 for v, o in zip(values, other, strict=True)):
                rest, scale = _reduced([v // o for v, o in zip(values, other, strict=True)])
                if rest in self._by_values:
                    second = self._by_values[rest]
                    return scale, _reduced(self.values[second])[1], (i, second)
        return self._sum(values)

    def _sum(self, values: tuple[int, ...]) -> Row | None:
        """Find values that are the sum or the difference of two lengths, or of a length and a constant."""
        for i, other in enumerate(self.values):
            for sign in (1, -1):
                rest = tuple(v - sign * o for v, o in zip(values, other, strict=True))
                shape, scale = _reduced(rest)
                second = self._by_values.get(shape)
                if len(set(rest)) == 1:
                    parts = [(sign, self.lengths[i]), (rest[0], Count(1, ()))]
                elif second is not None and scale % _reduced(self.values[second])[1] == 0:
                    parts = [(sign, self.lengths[i]), (scale // _reduced(self.values[second])[1], self.lengths[second])]
                else:
                    continue
                self.lengths.append(_combined(parts))
                self.values.append(values)
                self._by_values.setdefault(_reduced(values)[0], len(self.values) - 1)
                return 1, 1, (len(self.values) - 1,)
        return None


def _combined(parts: Sequence[tuple[int, Count]]) -> Count:
    """Return the sum of lengths, each so many times."""
    terms: dict[int, int] = {}
    for times, count in parts:
        for group, factor in count.terms:
            terms[group] = terms.get(group, 0) + times * factor
    return Count(sum(times * c.fixed for times, c in parts), tuple(sorted((g, f) for g, f in terms.items() if f)))


def _counts(graph: ChannelGraph) -> Iterator[Count]:
    """Yield every active length that the graph knows."""
    found: Iterable[Count | Area] = [
        *graph.lengths.values(),
        *graph.producers.values(),
        *(c for p in graph.products for c in p.counts),
        *(s.count for s in graph.attributes.values()),
    ]
    for count in found:
        yield from [c for c in (count.counts if isinstance(count, Area) else (count,)) if c.terms]


def _proportions(count: Count) -> tuple[Any, ...]:
    divisor = gcd(count.fixed, *(factor for _, factor in count.terms))
    return (count.fixed // divisor, tuple((group, factor // divisor) for group, factor in count.terms))
