"""Channel atoms, their union-find, and the constraints that a trace collects about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# One dimension of one tensor: the atom at every index, or None where the dimension carries no channels.
Vector = NDArray[np.int64]
Label = Vector | None


class Atoms:
    """A union-find over integers that merges whole arrays at once.

    An atom is one channel of one axis of one tensor. Merges are queued and settled in bulk, since a trace makes
    hundreds of thousands of them and looks at the result only now and then.
    """

    def __init__(self) -> None:
        self._parent: Vector = np.zeros(0, np.int64)
        self._count = 0
        self._pending: list[tuple[Vector, Vector]] = []

    def __len__(self) -> int:
        return self._count

    def fresh(self, n: int) -> Vector:
        """Return `n` new atoms, each alone in its class."""
        first, self._count = self._count, self._count + n
        return np.arange(first, self._count, dtype=np.int64)

    def join(self, a: Vector, b: Vector) -> None:
        """Merge `a[i]` with `b[i]` for every i."""
        if a is not b:
            self._pending.append((a.ravel(), b.ravel()))

    def find(self, a: Vector) -> Vector:
        """Return the representative (the smallest atom) of every atom's class."""
        self._settle()
        return self._root(a)

    def roots(self) -> Vector:
        """Return the representative of every atom there is."""
        self._settle()
        return self._root(np.arange(self._count))

    def _root(self, a: Vector) -> Vector:
        """Follow these atoms up to their representatives, and point them straight at those."""
        root = self._parent[a]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                self._parent[a] = root
                return root
            root = above

    def _settle(self) -> None:
        if len(self._parent) < self._count:
            new = np.arange(len(self._parent), self._count, dtype=np.int64)
            self._parent = np.concatenate([self._parent, new])
        if not self._pending:
            return
        left = np.concatenate([a for a, _ in self._pending])
        right = np.concatenate([b for _, b in self._pending])
        self._pending.clear()
        while True:
            a, b = self._root(left), self._root(right)
            apart = a != b
            if not apart.any():
                return
            left, right = left[apart], right[apart]
            np.minimum.at(self._parent, np.maximum(a, b)[apart], np.minimum(a, b)[apart])


@dataclass(frozen=True)
class AttributeUse:
    """A module attribute that gave the size of a dimension, or was derived from it.

    `value` is what it was in the trace. In a subnet it must be `value * (active(vector) / len(vector)) ** power`; where
    `vector` is None, the dimension carries no channels and the attribute must keep its value. The power is 1 for a
    size, and -0.5 for the scale of attention scores.
    """

    path: str
    value: int | float
    vector: Label
    power: float = 1


@dataclass(frozen=True)
class Kernel:
    """A weight's last axis that is laid out as a convolution's kernel (O, I, kh, kw), as in CondConv.

    The channel at index (o, i, y, x) of `vector` is active where those of all `parts` are. A part is None where the
    kernel has length 1.
    """

    vector: Vector
    shape: tuple[int, ...]
    parts: tuple[Label, ...]


@dataclass
class Constraints:
    """Everything a trace learned about its atoms, besides the merges themselves."""

    # (atoms, reason): these channels must stay.
    frozen: list[tuple[Vector, str]] = field(default_factory=list)
    # Vectors whose active counts must keep the proportion of their lengths (count ties).
    proportional: list[tuple[Vector, ...]] = field(default_factory=list)
    # Vectors whose channels are matched by position only, so they must keep their order.
    ordered: list[Vector] = field(default_factory=list)
    attributes: list[AttributeUse] = field(default_factory=list)
    # (module path, vector): this module produces these channels, in the order of execution.
    producers: list[tuple[str, Vector]] = field(default_factory=list)

    def freeze(self, label: Label, reason: str) -> None:
        """Record that the channels of `label` must stay, and why."""
        if label is not None:
            self.frozen.append((label, reason))

    def tie_counts(self, vectors: Sequence[Vector]) -> None:
        """Record that the active counts of `vectors` stay in proportion to their lengths."""
        if len(vectors) > 1:
            self.proportional.append(tuple(vectors))
