"""Numbers as functions of the widths, evaluated in bulk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from timm_autoslim.tracing.graph import Area, ChannelGraph, Count

Numbers = NDArray[np.int64]
Row = tuple[int, int, tuple[int, ...]]  # scale, divisor, and the lengths that are multiplied


class Terms:
    """Many numbers as functions of the widths: number i is `scale[i] * prod(lengths[factors[i]]) / divisor[i]`.

    The lengths are affine in the widths: `fixed + weights @ widths`.
    """

    def __init__(self, lengths: Sequence[Count], groups: int, rows: Sequence[Row]) -> None:
        self.fixed = np.array([c.fixed for c in lengths] + [1], np.int64)  # the last one is the empty product
        self.weights = np.zeros((len(lengths) + 1, groups), np.int64)
        for i, count in enumerate(lengths):
            for group, factor in count.terms:
                self.weights[i, group] += factor
        deepest = max((len(f) for _, _, f in rows), default=0)
        padded = [[*factors, *[len(lengths)] * (deepest - len(factors))] for _, _, factors in rows]
        self.factors = np.array(padded, np.int64).reshape(len(rows), deepest)
        self.scale = np.array([s for s, _, _ in rows], np.int64)
        self.divisor = np.array([d for _, d, _ in rows], np.int64)

    def __call__(self, widths: Sequence[int]) -> Numbers:
        """Return the numbers at these widths, one for each group."""
        lengths = self.fixed + self.weights @ np.asarray(widths, np.int64)
        found: Numbers = self.scale * lengths[self.factors].prod(1) // self.divisor
        return found


def parameter_terms(graph: ChannelGraph, tensors: Mapping[str, tuple[int, ...]]) -> Terms:
    """Return the sizes of these tensors as functions of the widths.

    Args:
        graph: says which of their axes shrink.
        tensors: by name, a factor and the shape.
    """
    lengths: dict[Count, int] = {}
    shrinking: dict[str, dict[int, Count | Area]] = {}
    for (name, axis), length in graph.lengths.items():
        shrinking.setdefault(name, {})[axis] = length
    rows = []
    for name, (factor, *shape) in tensors.items():
        scale, factors = factor, list[int]()
        for axis, n in enumerate(shape):
            found = shrinking.get(name, {}).get(axis)
            if found is None:
                scale *= n
                continue
            area = found if isinstance(found, Area) else Area(1, (found,))
            scale *= area.constant
            factors += [lengths.setdefault(c, len(lengths)) for c in area.counts]
        rows.append((scale, 1, tuple(factors)))
    return Terms(list(lengths), len(graph.group_sizes), rows)
