"""Channel atoms, their union-find, and what a trace collects about them."""

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

    An atom is one channel of one axis of one tensor. Atoms of one class are one unit. A trace joins hundreds of
    thousands of atoms and reads the classes rarely. So joins are queued, and merged in bulk before the next read.
    """

    def __init__(self) -> None:
        self._parent: Vector = np.zeros(0, np.int64)
        self._count = 0
        self._pending: list[tuple[Vector, Vector]] = []

    def __len__(self) -> int:
        return self._count

    def create(self, n: int) -> Vector:
        """Return `n` new atoms, each alone in its class."""
        first, self._count = self._count, self._count + n
        return np.arange(first, self._count, dtype=np.int64)

    def join(self, a: Vector, b: Vector) -> None:
        """Merge `a[i]` with `b[i]` for every i."""
        if a is not b:
            self._pending.append((a.ravel(), b.ravel()))

    def find(self, a: Vector) -> Vector:
        """Return the representative (the smallest atom) of every atom's class."""
        self._merge_pending()
        return self._find_roots(a)

    def find_all(self) -> Vector:
        """Return the representative of every atom, in order."""
        self._merge_pending()
        return self._find_roots(np.arange(self._count))

    def _find_roots(self, a: Vector) -> Vector:
        """Follow parents up to the representatives, and make these the parents (path compression)."""
        root = self._parent[a]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                self._parent[a] = root
                return root
            root = above

    def _merge_pending(self) -> None:
        """Carry out all joins that are queued."""
        if len(self._parent) < self._count:
            new = np.arange(len(self._parent), self._count, dtype=np.int64)
            self._parent = np.concatenate([self._parent, new])
        if not self._pending:
            return
        left = np.concatenate([a for a, _ in self._pending])
        right = np.concatenate([b for _, b in self._pending])
        self._pending.clear()
        while True:
            a, b = self._find_roots(left), self._find_roots(right)
            apart = a != b
            if not apart.any():
                return
            left, right = left[apart], right[apart]
            np.minimum.at(self._parent, np.maximum(a, b)[apart], np.minimum(a, b)[apart])


@dataclass(frozen=True)
class AttributeUse:
    """A module attribute that was the length of a dimension, or was computed from one.

    Attributes:
        path: the attribute, such as `layer1.0.conv1.out_channels`.
        value: what it is at the widest. In a subnet it is `value * (active(vector) / len(vector)) ** power`.
        vector: the channels that it counts; None if the dimension has no channels, and the attribute keeps its value.
        power: 1 for a size, -0.5 for the scale of attention scores.
    """

    path: str
    value: int | float
    vector: Label
    power: float = 1


@dataclass(frozen=True)
class Kernel:
    """The last axis of a weight matrix that is laid out as a convolution's kernel (O, I, kh, kw), as in CondConv.

    The channel at index (o, i, y, x) of `vector` is active where those of all `parts` are. A part is None where the
    kernel has length 1.
    """

    vector: Vector
    shape: tuple[int, ...]
    parts: tuple[Label, ...]


@dataclass(frozen=True)
class Contraction:
    """One matrix product or convolution: its MACs are `constant` times the active count of every vector."""

    path: str
    constant: float
    vectors: tuple[Vector, ...]


@dataclass
class Constraints:
    """What a trace learned about its atoms, besides the joins.

    Attributes:
        frozen_vectors: (vector, reason): no channel of the vector can be removed.
        count_ties: vectors whose active counts keep the proportion of their lengths.
        ordered_vectors: vectors whose channels are matched by position, so that they keep their order.
        attributes: the attributes that were lengths of dimensions.
        producers: (module path, vector): the module produces these channels, in the order of execution.
    """

    frozen_vectors: list[tuple[Vector, str]] = field(default_factory=list)
    count_ties: list[tuple[Vector, ...]] = field(default_factory=list)
    ordered_vectors: list[Vector] = field(default_factory=list)
    attributes: list[AttributeUse] = field(default_factory=list)
    producers: list[tuple[str, Vector]] = field(default_factory=list)

    def freeze(self, label: Label, reason: str) -> None:
        """Freeze the channels of `label`."""
        if label is not None:
            self.frozen_vectors.append((label, reason))

    def tie_counts(self, vectors: Sequence[Vector]) -> None:
        """Keep the active counts of `vectors` in proportion to their lengths."""
        if len(vectors) > 1:
            self.count_ties.append(tuple(vectors))
