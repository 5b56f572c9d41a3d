"""Numbers as functions of the widths: lengths, attributes and products, one by one or as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Row = tuple[int, int, tuple[int, ...]]  # scale, divisor, and the indices of the lengths that are multiplied
Place = tuple[str, int]  # a tensor's name and one of its axes


@dataclass(frozen=True)
class Count:
    """The active length of a dimension: `fixed + sum(factor * width[group])`.

    Attributes:
        fixed: how many of its channels are fixed.
        terms: (group, factor): `factor` channels are active for each step of the group's width.
    """

    fixed: int
    terms: tuple[tuple[int, int], ...]

    def __call__(self, widths: Sequence[int]) -> int:
        """Return the active length at these widths, one for each group."""
        return self.fixed + sum(factor * widths[group] for group, factor in self.terms)


@dataclass(frozen=True)
class KernelLength:
    """The active length of an axis that is laid out as a kernel: `constant` times the product of the counts."""

    constant: int
    counts: tuple[Count, ...]

    def __call__(self, widths: Sequence[int]) -> int:
        """Return the active length at these widths, one for each group."""
        return self.constant * prod(count(widths) for count in self.counts)


Length = Count | KernelLength


@dataclass(frozen=True)
class AttributeFormula:
    """A module's attribute that changes with the number of some channels.

    Attributes:
        value: what it is at the widest.
        length: the number of these channels at the widest.
        count: the number of these channels that are active.
        power: 1 for a size, -0.5 for the scale of attention scores.
    """

    value: int | float
    length: int
    count: Count
    power: float

    def __call__(self, widths: Sequence[int]) -> int | float:
        """Return the attribute's value at these widths, one for each group."""
        active = self.count(widths)
        if self.power == 1:
            return int(self.value) * active // self.length
        if active == self.length:
            return self.value
        return float(active**self.power * (self.value / self.length**self.power))


@dataclass(frozen=True)
class Product:
    """MACs of one matrix product or convolution for one image: `constant` times the product of the counts.

    Attributes:
        path: the module that runs it.
        constant, counts: what is multiplied.
        reason: why channels of it are fixed; None if none are.
    """

    path: str
    constant: float
    counts: tuple[Count, ...]
    reason: str | None


class Terms:
    """Many numbers as functions of the widths, computed with arrays.

    The lengths are `fixed + weights @ widths`. Number i is `scale[i] * prod(lengths[factors[i]]) // divisor[i]`.
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
        numbers: Numbers = self.scale * lengths[self.factors].prod(1) // self.divisor
        return numbers


def make_size_terms(lengths: Mapping[Place, Length], groups: int, tensors: Mapping[str, tuple[int, ...]]) -> Terms:
    """Return the sizes of tensors as functions of the widths.

    Args:
        lengths: the active length of every axis that can shrink.
        groups: how many groups there are.
        tensors: by name, a factor (such as the bytes of one element) and the shape.
    """
    columns: dict[Count, int] = {}
    axes: dict[str, dict[int, Length]] = {}
    for (name, axis), length in lengths.items():
        axes.setdefault(name, {})[axis] = length
    rows = []
    for name, (factor, *shape) in tensors.items():
        scale, factors = factor, list[int]()
        for axis, n in enumerate(shape):
            active = axes.get(name, {}).get(axis)
            if active is None:
                scale *= n
                continue
            area = active if isinstance(active, KernelLength) else KernelLength(1, (active,))
            scale *= area.constant
            factors += [columns.setdefault(count, len(columns)) for count in area.counts]
        rows.append((scale, 1, tuple(factors)))
    return Terms(list(columns), groups, rows)
