"""Find numbers of a forward as functions of the widths, from the values that they had at a few widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

from timm_autoslim.tracing.formulas import Count, KernelLength, Length, Row
from timm_autoslim.tracing.graph import ChannelGraph


def _reduce(numbers: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Return the numbers without their common divisor, and the divisor."""
    divisor = gcd(*numbers) or 1
    return tuple(n // divisor for n in numbers), divisor


class FormulaFinder:
    """Finds products and sums of active lengths that have the values which a number had at some widths.

    Attributes:
        lengths: the active lengths: those of the channel graph, and the sums that were found so far.
    """

    def __init__(self, graph: ChannelGraph, widths: Sequence[Sequence[int]]) -> None:
        """Start with the lengths of a graph; `widths` are those of all runs, one for each group."""
        self.lengths: list[Count] = list(dict.fromkeys(_list_lengths(graph)))
        self._values = [tuple(length(w) for w in widths) for length in self.lengths]
        self._by_values = {_reduce(v)[0]: i for i, v in reversed(list(enumerate(self._values)))}
        self._rows: dict[tuple[int, ...], Row | None] = {}

    def is_ambiguous(self) -> bool:
        """Whether two different lengths had the same values in all runs."""
        return len(self._by_values) < len({_proportions(length) for length in self.lengths})

    def find(self, values: tuple[int, ...]) -> Row | None:
        """Return scale, divisor and factors of a number that had these values, or None if there are none."""
        if values not in self._rows:
            self._rows[values] = self._find(values)
        return self._rows[values]

    def _find(self, values: tuple[int, ...]) -> Row | None:
        if len(set(values)) == 1:
            return values[0], 1, ()
        reduced, scale = _reduce(values)
        index = self._by_values.get(reduced)
        if index is not None:
            return scale, _reduce(self._values[index])[1], (index,)
        for i, other in enumerate(self._values):  # a product of two lengths, or a sum
            if any(other) and all(o and v % o == 0 for v, o in zip(values, other, strict=True)):
                rest, scale = _reduce([v // o for v, o in zip(values, other, strict=True)])
                if rest in self._by_values:
                    second = self._by_values[rest]
                    return scale, _reduce(self._values[second])[1], (i, second)
        return self._find_sum(values)

    def _find_sum(self, values: tuple[int, ...]) -> Row | None:
        """Find a sum or a difference of two lengths, or of a length and a constant."""
        for i, other in enumerate(self._values):
            for sign in (1, -1):
                rest = tuple(v - sign * o for v, o in zip(values, other, strict=True))
                reduced, scale = _reduce(rest)
                second = self._by_values.get(reduced)
                if len(set(rest)) == 1:
                    parts = [(sign, self.lengths[i]), (rest[0], Count(1, ()))]
                elif second is not None and scale % _reduce(self._values[second])[1] == 0:
                    times = scale // _reduce(self._values[second])[1]
                    parts = [(sign, self.lengths[i]), (times, self.lengths[second])]
                else:
                    continue
                self.lengths.append(_add(parts))
                self._values.append(values)
                self._by_values.setdefault(_reduce(values)[0], len(self._values) - 1)
                return 1, 1, (len(self._values) - 1,)
        return None


def _add(parts: Sequence[tuple[int, Count]]) -> Count:
    """Return the sum of lengths, each so many times."""
    terms: dict[int, int] = {}
    for times, count in parts:
        for group, factor in count.terms:
            terms[group] = terms.get(group, 0) + times * factor
    return Count(sum(times * c.fixed for times, c in parts), tuple(sorted((g, f) for g, f in terms.items() if f)))


def _list_lengths(graph: ChannelGraph) -> Iterator[Count]:
    """Yield every active length of a graph that changes with the widths."""
    lengths: list[Length] = [
        *graph.lengths.values(),
        *graph.producers.values(),
        *(count for product in graph.products for count in product.counts),
        *(attribute.count for attribute in graph.attributes.values()),
    ]
    for length in lengths:
        yield from [c for c in (length.counts if isinstance(length, KernelLength) else (length,)) if c.terms]


def _proportions(count: Count) -> tuple[Any, ...]:
    """Return a length without the common divisor of its numbers."""
    divisor = gcd(count.fixed, *(factor for _, factor in count.terms))
    return (count.fixed // divisor, tuple((group, factor // divisor) for group, factor in count.terms))
