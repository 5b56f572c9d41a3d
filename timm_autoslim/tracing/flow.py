"""The state of a trace: which labels each tensor carries, and the few moves that operator rules are made of."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from timm_autoslim.tracing.labels import Atoms, AttributeUse, Constraints, Kernel, Label, Vector
from timm_autoslim.tracing.sizes import (
    FromAttribute,
    FromDimension,
    FromExpression,
    Size,
    factors,
    is_proportional,
    leaves,
    quotient,
)
from timm_autoslim.utils.running import ModuleStack

Labels = list[Label]


@dataclass(frozen=True)
class Contraction:
    """One matrix product or convolution: its MACs are `constant` times the active count of every vector."""

    path: str
    constant: float
    vectors: tuple[Vector, ...]


@dataclass
class Call:
    """The torch function that is running, with the arguments as the model's code wrote them."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def sequences(self) -> list[list[int]]:
        """Return every list of integers among the arguments, and the run of bare integers."""
        found: list[list[int]] = []
        bare: list[int] = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, (tuple, list)) and value and all(isinstance(v, int) for v in value):
                found.append(list(value))
            elif isinstance(value, int) and not isinstance(value, bool):
                bare.append(value)
        return [*found, bare]


class Flow:
    """Labels by tensor, the constraints so far, and where in the model the trace is."""

    def __init__(self, whole_heads: Sequence[str] = ()) -> None:
        self.whole_heads = tuple(whole_heads)  # globs of modules that lose whole heads
        self.heads_found: set[str] = set()  # those of them that split channels into heads
        self.contracted: dict[str, list[Vector]] = {}  # by module, what its products of two activations run along
        self.atoms = Atoms()
        self.flat: dict[int, Vector] = {}  # last axes of matrices among the weights, by their first atom
        self.kernels: dict[int, Kernel] = {}  # those of them that are laid out as kernels
        self.constraints = Constraints()
        self.contractions: list[Contraction] = []
        self.call = Call("", (), {})
        self.stack = ModuleStack()
        self.count_macs = False
        self._frozen_seen = 0
        self._frozen_atoms: Vector = np.zeros(0, np.int64)
        self._labels: dict[int, tuple[Tensor, Labels]] = {}  # the tensor is kept alive: ids are reused otherwise
        self._indices: dict[int, tuple[Tensor, Labels]] = {}  # tensors that hold indices of channels

    @property
    def path(self) -> str:
        """The module that is running."""
        return self.stack.path

    # -- labels -------------------------------------------------------------------------------------------------

    def labels(self, tensor: Tensor) -> Labels:
        """Return one label for each dimension of `tensor`."""
        if self.stack.idle:  # it is an output of the model
            self.use(tensor)
        known = self._labels.get(id(tensor))
        return list(known[1]) if known else [None] * tensor.dim()

    def set_labels(self, tensor: Tensor, labels: Sequence[Label]) -> None:
        """Record the labels of `tensor`; a dimension of length 1 never carries channels."""
        shape = tensor.shape
        assert len(labels) == len(shape), (self.call.name, len(labels), tuple(shape))
        clean: Labels = []
        for label, size in zip(labels, shape, strict=True):
            assert label is None or len(label) == size, (self.call.name, len(label), size)
            clean.append(None if size == 1 else label)
        self._labels[id(tensor)] = (tensor, clean)

    def fresh_labels(self, tensor: Tensor) -> Labels:
        """Give every axis of a weight atoms of its own."""
        labels: Labels = [self.atoms.fresh(n) if n > 1 else None for n in tensor.shape]
        self.set_labels(tensor, labels)
        return self.labels(tensor)

    def index(self, tensor: Tensor, labels: Labels) -> None:
        """Record that `tensor` holds indices of the channels of `labels`, which must stay if anything reads it."""
        self._indices[id(tensor)] = (tensor, labels)

    def use(self, tensor: Tensor) -> None:
        """Note that the model reads `tensor`."""
        if id(tensor) in self._indices:
            self.freeze_all(self._indices[id(tensor)][1], "an index of channels leaves it")

    # -- moves --------------------------------------------------------------------------------------------------

    def freeze(self, label: Label, reason: str) -> None:
        """Keep these channels, and say why; the running module is named in front."""
        self.constraints.freeze(label, f"{self.path or 'the model'}: {reason}")

    def stays(self, label: Vector) -> bool:
        """Whether all channels of `label` are known by now to stay."""
        frozen = self.constraints.frozen
        if len(frozen) != self._frozen_seen:
            self._frozen_seen = len(frozen)
            self._frozen_atoms = np.unique(np.concatenate([v for v, _ in frozen]))
        if not len(self._frozen_atoms):
            return False
        staying = np.zeros(len(self.atoms), bool)
        staying[self.atoms.find(self._frozen_atoms)] = True
        return bool(staying[self.atoms.find(label)].all())

    def freeze_all(self, labels: Sequence[Label], reason: str) -> None:
        """Keep the channels of all of `labels`."""
        for label in labels:
            self.freeze(label, reason)

    def join(self, a: Label, b: Label, what: str) -> Label:
        """Make two dimensions of equal length live and die together (a unit tie)."""
        if a is None or b is None:
            known = a if b is None else b
            self.freeze(known, f"{what} meets a dimension of fixed length")
            return known
        self.atoms.join(a, b)
        return a

    def broadcast(self, tensors: Sequence[Tensor], out_shape: Sequence[int], what: str) -> Labels:
        """Join the labels of `tensors` dimension by dimension, aligned at the right."""
        out: Labels = []
        for position in range(-len(out_shape), 0):
            wide = [t for t in tensors if t.dim() >= -position and t.shape[position] != 1]
            dims = [self.labels(t)[position] for t in wide]
            label = dims[0] if dims else None
            for other in dims[1:]:
                if label is not None or other is not None:
                    label = self.join(label, other, what)
            out.append(label)
        return out

    def produce(self, label: Label) -> None:
        """Record that the running module produces these channels."""
        if label is not None:
            self.constraints.producers.append((self.path, label))

    def contract(self, constant: float, sizes: Sequence[tuple[int, Label]]) -> None:
        """Count the MACs of a product over dimensions of these lengths."""
        if not self.count_macs:
            return
        vectors = []
        for length, label in sizes:
            if label is None:
                constant *= length
            else:
                vectors.append(label)
        self.contractions.append(Contraction(self.path, constant, tuple(vectors)))

    # -- sizes --------------------------------------------------------------------------------------------------

    def sizes(self, tensor: Tensor) -> list[int]:
        """Return the shape of `tensor` as sizes that remember their dimensions."""
        labels = self.labels(tensor)
        return [n if v is None else Size(n, FromDimension(v)) for n, v in zip(tensor.shape, labels, strict=True)]

    def written(self, sizes: Sequence[int]) -> Sequence[int] | None:
        """Find the argument of the running torch function that these sizes came from (-1 matches anything)."""
        for candidate in self.call.sequences():
            if len(candidate) == len(sizes) and all(
                a == b or a == -1 or b == -1 for a, b in zip(candidate, sizes, strict=True)
            ):
                return candidate
        return None

    def written_one(self, value: int) -> int:
        """Find the single integer argument that equals `value`, with its origin if it has one."""
        for candidate in self.call.sequences():
            for size in candidate:
                if size == value and isinstance(size, Size):
                    return size
        return value

    def constrain(self, label: Label, size: int) -> None:
        """Tie the active count of a dimension to the integer that the model's code gave for its length."""
        if size == -1:
            return
        if not isinstance(size, Size):
            self.freeze(label, f"{self.call.name} is given the literal size {int(size)}")
            return
        if label is None and self._quotient(size):
            return
        found = list(leaves(size))
        dims = [leaf.origin.vector for leaf in found if isinstance(leaf.origin, FromDimension)]
        if label is not None and dims:
            self.constraints.tie_counts([label, *dims])
        elif not dims and self._difference(size, label):
            pass
        elif not dims and is_proportional(size):
            for leaf in found:
                self._bind(leaf, label)
        elif not dims and factors(size):  # one factor shrinks: the one that does elsewhere, or the largest
            shrinks = max(factors(size), key=self._preference)
            for leaf in found:
                self._bind(leaf, label if leaf is shrinks else None)

    def _preference(self, leaf: Size) -> tuple[bool, bool, int]:
        """Rank an attribute that may shrink: channels that do shrink first, then those that nothing has fixed."""
        assert isinstance(leaf.origin, FromAttribute)
        path = leaf.origin.path
        vectors = [use.vector for use in self.constraints.attributes if use.path == path]
        return any(v is not None and not self.stays(v) for v in vectors), not self._fixed(path), int(leaf)

    def _quotient(self, size: Size) -> bool:
        """Make a and b of `a // b` change in step where the quotient must stay (channels by heads, if heads go)."""
        operands = quotient(size)
        if operands is None:
            return False
        step = self.atoms.fresh(int(operands[1]))
        for operand in operands:
            for leaf in leaves(operand):
                if isinstance(leaf.origin, FromDimension):
                    self.constraints.tie_counts([step, leaf.origin.vector])
                else:
                    self._bind(leaf, step)
        return True

    def _difference(self, size: Size, label: Label) -> bool:
        """Bind a in `a - b` to the channels that b counts and these (as in a split into b and the rest)."""
        if not (isinstance(size.origin, FromExpression) and size.origin.difference) or label is None:
            return False
        whole, part = (s.origin for s in size.origin.operands)
        if not isinstance(whole, FromAttribute) or not isinstance(part, FromAttribute):
            return False
        for use in self.constraints.attributes:
            if use.path == part.path and use.vector is not None:
                self._bind(size.origin.operands[0], np.concatenate([use.vector, label]))
                return True
        return False

    def _bind(self, leaf: Size, label: Label) -> None:
        assert isinstance(leaf.origin, FromAttribute)
        self.constraints.attributes.append(AttributeUse(leaf.origin.path, int(leaf), label))

    def _fixed(self, path: str) -> bool:
        """Whether this attribute has given the length of a dimension without channels, and so keeps its value."""
        return any(use.path == path and use.vector is None for use in self.constraints.attributes)

    def sized(self, size: int, given: int) -> Label:
        """Return the label of a new dimension whose length the model's code gave as `given`."""
        if size == 1 or not isinstance(given, Size):
            return None
        if isinstance(given.origin, FromDimension):
            return given.origin.vector
        if isinstance(given.origin, FromAttribute) and self._fixed(given.origin.path):
            return None
        label = self.atoms.fresh(size)
        self.constrain(label, given)
        return label

    def kernel(self, label: Label, shape: tuple[int, ...]) -> Kernel | None:
        """Lay the last axis of a weight matrix out as a kernel (O, I, kh, kw), unless something else has touched it."""
        if label is None or (whole := self.flat.get(int(label[0]))) is None or not np.array_equal(whole, label):
            return None
        known = self.kernels.get(int(label[0]))
        if known is None and np.array_equal(self.atoms.find(label), label):
            parts = tuple(self.atoms.fresh(n) if n > 1 else None for n in shape)
            self.constraints.ordered.extend(p for p in parts if p is not None)
            known = self.kernels[int(label[0])] = Kernel(label, shape, parts)
        return known if known is not None and known.shape == shape else None

    # -- splitting one dimension into several -------------------------------------------------------------------

    def split(self, vector: Vector, sizes: Sequence[int], given: Sequence[int] | None) -> Labels:
        """Label the dimensions that one labelled dimension is split into; only one of them can shrink.

        The channels at equal indices of that dimension live and die together, so that what is left stays rectangular.
        """
        grid = vector.reshape([int(s) for s in sizes])
        roots = self.atoms.find(grid)
        separable = self._separable(roots)
        axis = separable
        if separable is None:
            globs = self.loses_heads()
            self.heads_found.update(globs)
            axis = self._shrinking_axis(roots, given, bool(globs))
        out: Labels = [None] * len(sizes)
        if axis is None:
            self.freeze(vector, f"{self.call.name} splits it into literal sizes {[int(s) for s in sizes]}")
            return out
        rows = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
        if separable is None and self.collapses(rows):
            out[axis] = self.by_position(rows)
        else:
            for row in rows[1:]:
                self.atoms.join(rows[0], row)
            out[axis] = rows[0]
        return out

    def loses_heads(self) -> list[str]:
        """Return the user's globs by which the running module loses whole heads, not channels of every head."""
        return [glob for glob in self.whole_heads if fnmatch.fnmatchcase(self.path, glob)]

    @staticmethod
    def _separable(roots: Vector) -> int | None:
        """Return the only axis along which the grid varies, if there is one."""
        for axis in range(roots.ndim):
            lines = np.moveaxis(roots, axis, -1).reshape(-1, roots.shape[axis])
            if (lines == lines[0]).all():
                return axis
        return None

    @staticmethod
    def _shrinking_axis(roots: Vector, given: Sequence[int] | None, heads: bool) -> int | None:
        """Prefer the last dimension (head_dim), unless its size is a literal or no more than a pair; or the first."""
        sizes = roots.shape
        free = [i for i, s in enumerate(sizes) if given is None or isinstance(given[i], Size) or given[i] == -1]
        free = [i for i in free if (roots != roots.take([0], i)).any()]  # along others a channel only repeats
        if not free:
            return None
        if heads:
            return free[0]
        return free[-1] if sizes[free[-1]] > 2 else max(free, key=lambda i: sizes[i])

    def collapses(self, rows: Vector) -> bool:
        """Whether tying the rows would merge different channels of one row (a repeated channel shuffle does)."""
        if len(rows) < 2:
            return False
        counts = [len(np.unique(self.atoms.find(row))) for row in rows]
        trial = Atoms()
        codes = np.unique(self.atoms.find(rows), return_inverse=True)[1].reshape(rows.shape)
        trial.fresh(int(codes.max()) + 1)
        for row in codes[1:]:
            trial.join(codes[0], row)
        return len(np.unique(trial.find(codes[0]))) < max(counts)

    def by_position(self, rows: Vector) -> Vector:
        """Start fresh channels that are tied to the rows by count and position only."""
        label = self.atoms.fresh(rows.shape[1])
        self.constraints.tie_counts([label, rows.ravel()])
        self.constraints.ordered.extend([rows.ravel(), label])
        return label
