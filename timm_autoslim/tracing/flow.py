"""The state of a trace: the labels of every tensor, and the steps that operator rules are made of."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from timm_autoslim.tracing.labelling import Labelling, Labels
from timm_autoslim.tracing.labels import Atoms, AttributeUse, Kernel, Label, Vector
from timm_autoslim.tracing.origins import (
    FromAttribute,
    FromDimension,
    FromExpression,
    Number,
    find_factors,
    find_leaves,
    find_quotient,
    is_proportional,
)
from timm_autoslim.tracing.sizes import Size
from timm_autoslim.tracing.watching import Check
from timm_autoslim.utils.globs import matches


@dataclass(frozen=True, eq=False)
class Length:
    """A number that the model's code has computed from sizes, and passed as a length or as the place of a cut.

    Attributes:
        path: the module that passed it.
        label: the channels that it counts; None if it counts none, and stays.
        size: the number.
    """

    path: str
    label: Label
    size: Number


class Flow(Labelling):
    """The state of a trace: on top of the labels, what becomes of sizes, and how a dimension is split.

    Attributes:
        whole_heads: globs of the modules that lose whole heads.
        equal_shares: whether a group norm always loses an equal share of each group, never entire groups.
        matching_globs: those globs that matched a module which splits channels into heads.
        has_lost_groups: whether one loses entire groups.
        matrix_columns: the last axis of every matrix among the weights, by its first atom.
        kernels: those of them that are laid out as kernels, by their first atom.
        checks: what the model's code has asked about sizes.
        lengths: numbers computed from sizes that its code has passed as lengths.
        asks_gradients: whether it has asked if gradients are enabled.
    """

    def __init__(self, whole_heads: Sequence[str] = (), equal_shares: bool = False) -> None:
        super().__init__()
        self.whole_heads, self.equal_shares = tuple(whole_heads), equal_shares
        self.matching_globs: set[str] = set()
        self.has_lost_groups = False
        self.matrix_columns: dict[int, Vector] = {}
        self.kernels: dict[int, Kernel] = {}
        self.lengths: list[Length] = []
        self._steps: dict[str, Vector] = {}  # by attribute, the steps of those channels that are a multiple of it
        self._equalities: list[tuple[Number, Number]] = []
        self.checks: list[Check] = []
        self.asks_gradients = False
        self._ordinary: dict[str, dict[int, Size]] = {}  # by module, sizes that became ordinary integers

    # -- sizes --------------------------------------------------------------------------------------------------

    def get_sizes(self, tensor: Tensor) -> list[int]:
        """Return the shape of `tensor`; the length of every dimension of channels is a `Size` with this origin."""
        labels = self.get_labels(tensor)
        return [n if v is None else Size(n, FromDimension(v)) for n, v in zip(tensor.shape, labels, strict=True)]

    def constrain(self, label: Label, size: int | Number) -> None:
        """Tie the active count of a dimension to the integer that the model's code passed as its length."""
        if size == -1:
            return
        if isinstance(size, Number) and _is_computed(size) and (label is None or len(label) == int(size)):
            self.lengths.append(Length(self.path, label, size))
        if not isinstance(size, Size):
            self.freeze_label(label, f"the code passes the constant {int(size)} to {self.call.name}")
            return
        if label is None and (size.is_guess or self._tie_quotient(size)):
            return
        parts = None if label is None else _list_summands(size)
        if label is not None and parts is not None and sum(map(int, parts)) == len(label):
            return self._constrain_parts(label, parts)
        leaves = list(find_leaves(size))
        dims = [leaf.origin.vector for leaf in leaves if isinstance(leaf.origin, FromDimension)]
        if self._bind_difference(size, label):
            pass
        elif label is not None and dims:
            self.constraints.tie_counts([label, *dims])
        elif not dims and is_proportional(size):
            for leaf in leaves:
                self._bind_attribute(leaf, label)
            if label is not None and not _is_difference(size):
                self._tie_multiples(leaves, label)
        elif not dims and find_factors(size):  # only one factor can shrink; all others keep their value
            factor = max(find_factors(size), key=self._rank_factor)
            for leaf in leaves:
                self._bind_attribute(leaf, label if leaf is factor else None)
            if label is not None:
                self._tie_multiples([factor], label)

    def _constrain_parts(self, label: Vector, sizes: Sequence[Number]) -> None:
        """Tie parts of a dimension to the sizes whose sum the model's code passed as its length."""
        dims = [size.origin.vector for size in sizes if isinstance(size.origin, FromDimension)]
        if len(dims) == len(sizes):
            ours, theirs = (np.sort(self.atoms.find(vector)) for vector in (label, np.concatenate(dims)))
            if np.array_equal(ours, theirs):  # these very dimensions, one after the other
                return
        for part, size in zip(np.split(label, np.cumsum([int(size) for size in sizes])[:-1]), sizes, strict=True):
            self.constrain(part, size)

    def _tie_multiples(self, leaves: Sequence[Number], label: Vector) -> None:
        """Let channels that are a multiple of attributes, such as 4 gates of `hidden` channels, go by that many."""
        for leaf in leaves:
            if 1 < int(leaf) < len(label):
                path = leaf.origin.path
                if path not in self._steps:
                    self._steps[path] = self.atoms.create(int(leaf))
                self.constraints.tie_counts([label, self._steps[path]])

    def note_equal(self, a: Number, b: Number) -> None:
        """Keep two sizes equal in every subnet, because the model's code compares them and goes on if they are."""
        self._equalities.append((a, b))
        for one, other in ((a, b), (b, a)):
            leaves = list(find_leaves(one))
            if len(leaves) == 1 and is_proportional(one) and isinstance(leaves[0].origin, FromDimension):
                return self.constrain(leaves[0].origin.vector, other)
        return None

    def note_check(self, check: Check) -> None:
        """Remember what the model's code has asked about sizes: the answer must be the same in every subnet."""
        self.checks.append(check)

    def bind_equal_attributes(self, descriptions: Sequence[AttributeUse] = ()) -> None:
        """Bind attributes that the model's code has compared with others to the channels of these.

        Args:
            descriptions: attributes that describe modules, with the channels that they count.
        """
        for a, b in self._equalities:
            for one, other in ((a, b), (b, a)):
                factors = [leaf.origin.path for leaf in find_factors(one) if isinstance(leaf.origin, FromAttribute)]
                uses = [use for use in (*self.constraints.attributes, *descriptions) if use.path in factors]
                vectors = [use.vector for use in uses if use.vector is not None]
                if len({use.path for use in uses if use.vector is not None}) == 1:  # the others stay
                    for vector in vectors:
                        if not self.is_frozen(vector):
                            self.constrain(vector, other)

    def note_ordinary(self, size: Number) -> None:
        """Remember a size that the model's code has made an ordinary integer of, as by `int(x.shape[1])`."""
        guess = Size(int(size), size.origin)
        guess.is_guess = True
        self._ordinary.setdefault(self.path, {})[int(size)] = guess

    def note_gradients(self) -> None:
        """Remember that the model's code has asked whether gradients are enabled."""
        self.asks_gradients = True

    def restore_origins(self, values: Any) -> Any:
        """Return arguments with their origins: an integer may be one that the running modules made of a size."""
        known = [self._ordinary[path] for path in reversed(self.stack.paths) if path in self._ordinary]
        return _restore_origins(values, known) if known else values

    def forget_ordinary(self) -> None:
        """Forget the ordinary integers of the last run."""
        self._ordinary.clear()

    def _rank_factor(self, leaf: Number) -> tuple[bool, bool, int]:
        """Rank a factor for shrinking: first one that shrinks elsewhere, then one that is not fixed, then by size."""
        assert isinstance(leaf.origin, FromAttribute)
        path = leaf.origin.path
        vectors = [use.vector for use in self.constraints.attributes if use.path == path]
        shrinks = any(v is not None and not self.is_frozen(v) for v in vectors)
        return shrinks, not self._is_fixed_attribute(path), int(leaf)

    def _tie_quotient(self, size: Number) -> bool:
        """Tie a and b where `a // b` cannot shrink, such as channels and heads; return whether `size` is a quotient."""
        operands = find_quotient(size)
        if operands is None:
            return False
        step = self.atoms.create(int(operands[1]))
        for operand in operands:
            for leaf in find_leaves(operand):
                if isinstance(leaf.origin, FromDimension):
                    self.constraints.tie_counts([step, leaf.origin.vector])
                else:
                    self._bind_attribute(leaf, step)
        return True

    def _bind_difference(self, size: Number, label: Label) -> bool:
        """Bind a of `a - b` to the channels of b and `label`, as in a split into b and the rest; return whether."""
        if not _is_difference(size) or label is None:
            return False
        total, part = size.origin.operands
        if not isinstance(total.origin, FromAttribute):
            return False
        vectors = [part.origin.vector] if isinstance(part.origin, FromDimension) else []
        if isinstance(part.origin, FromAttribute):
            uses = self.constraints.attributes
            vectors = [use.vector for use in uses if use.path == part.origin.path and use.vector is not None]
        if vectors:
            self._bind_attribute(total, np.concatenate([vectors[0], label]))
        return bool(vectors)

    def _bind_attribute(self, leaf: Number, label: Label) -> None:
        assert isinstance(leaf.origin, FromAttribute)
        self.constraints.attributes.append(AttributeUse(leaf.origin.path, int(leaf), label))

    def _is_fixed_attribute(self, path: str) -> bool:
        """Whether this attribute was the length of a dimension without channels, and so keeps its value."""
        return any(use.path == path and use.vector is None for use in self.constraints.attributes)

    def label_new_dimension(self, length: int, size: int) -> Label:
        """Return the label of a new dimension of this length; `size` is the length as the model's code passed it."""
        if length == 1 or not isinstance(size, Size):
            return None
        if isinstance(size.origin, FromDimension):
            return size.origin.vector
        if isinstance(size.origin, FromAttribute) and self._is_fixed_attribute(size.origin.path):
            return None
        label = self.atoms.create(length)
        self._new.add(int(label[0]))
        self.constrain(label, size)
        return label

    def lay_out_kernel(self, label: Label, shape: tuple[int, ...]) -> Kernel | None:
        """Lay out the columns of a weight matrix as a kernel (O, I, kh, kw), unless they are joined to anything."""
        columns = None if label is None else self.matrix_columns.get(int(label[0]))
        if label is None or columns is None or not np.array_equal(columns, label):
            return None
        kernel = self.kernels.get(int(label[0]))
        if kernel is None and np.array_equal(self.atoms.find(label), label):
            parts = tuple(self.atoms.create(n) if n > 1 else None for n in shape)
            self.constraints.ordered_vectors.extend(p for p in parts if p is not None)
            kernel = self.kernels[int(label[0])] = Kernel(label, shape, parts)
        return kernel if kernel is not None and kernel.shape == shape else None

    # -- splitting one dimension into several -------------------------------------------------------------------

    def split(self, vector: Vector, sizes: Sequence[int], sizes_in_code: Sequence[int] | None) -> Labels:
        """Label the dimensions that one dimension of channels is split into; only one of them can shrink.

        The channels at equal indices of that dimension become one unit, so that what a subnet keeps is rectangular.

        Args:
            vector: the label of the dimension.
            sizes: the lengths that it is split into.
            sizes_in_code: these lengths as the model's code passed them; None if it did not.
        """
        grid = vector.reshape([int(s) for s in sizes])
        roots = self.atoms.find(grid)
        separable = self._find_separable_axis(roots)
        axis = separable
        if separable is None:
            globs = self.find_head_globs()
            self.matching_globs.update(globs)
            axis = self._choose_shrinking_axis(roots, sizes_in_code, bool(globs))
        out: Labels = [None] * len(sizes)
        if axis is None:
            lengths = [int(s) for s in sizes]
            self.freeze_label(vector, f"{self.call.name} splits these channels into the constant sizes {lengths}")
            return out
        rows = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
        if separable is None and self.would_merge(rows):
            out[axis] = self.tie_by_position(rows)
        else:
            for row in rows[1:]:
                self.atoms.join(rows[0], row)
            out[axis] = rows[0]
        return out

    def find_head_globs(self) -> list[str]:
        """Return the globs of `whole_heads` that match the running module."""
        return [glob for glob in self.whole_heads if matches(self.path, glob)]

    @staticmethod
    def _find_separable_axis(roots: Vector) -> int | None:
        """Return the only axis along which the grid varies, if there is one."""
        for axis in range(roots.ndim):
            lines = np.moveaxis(roots, axis, -1).reshape(-1, roots.shape[axis])
            if (lines == lines[0]).all():
                return axis
        return None

    @staticmethod
    def _choose_shrinking_axis(roots: Vector, sizes_in_code: Sequence[int] | None, heads: bool) -> int | None:
        """Choose the axis that can shrink, or None if the code passes constants for all.

        It is the first axis if heads are lost. Otherwise it is the one whose length the code computes, by a constant,
        from the dimensions of tensors, if all others get -1; else the last (the channels of a head), or the longest if
        the last has at most two.
        """
        sizes, code = roots.shape, sizes_in_code
        axes = [i for i in range(len(sizes)) if code is None or isinstance(code[i], Size) or code[i] == -1]
        axes = [i for i in axes if (roots != roots.take([0], i)).any()]  # along others a channel only repeats
        if not axes:
            return None
        if heads:
            return axes[0]
        computed = [i for i in axes if code is not None and follows_dimensions(code[i])]
        if len(computed) == 1 and all(code is not None and code[i] == -1 for i in axes if i not in computed):
            return computed[0]
        return axes[-1] if sizes[axes[-1]] > 2 else max(axes, key=lambda i: sizes[i])

    def would_merge(self, rows: Vector) -> bool:
        """Whether joining the rows would merge different channels of one row, as after a second channel shuffle."""
        if len(rows) < 2:
            return False
        counts = [len(np.unique(self.atoms.find(row))) for row in rows]
        trial = Atoms()
        codes = np.unique(self.atoms.find(rows), return_inverse=True)[1].reshape(rows.shape)
        trial.create(int(codes.max()) + 1)
        for row in codes[1:]:
            trial.join(codes[0], row)
        return len(np.unique(trial.find(codes[0]))) < max(counts)

    def tie_rows(self, rows: Vector) -> None:
        """Tie the channels of each row: they are removed together."""
        for column in range(1, rows.shape[1]):
            self.atoms.join(rows[:, 0], rows[:, column])

    def tie_by_position(self, rows: Vector) -> Vector:
        """Return new channels that are tied to the rows by count and position only."""
        label = self.atoms.create(rows.shape[1])
        self.constraints.tie_counts([label, rows.ravel()])
        self.constraints.ordered_vectors.extend([rows.ravel(), label])
        return label


def _is_computed(size: Number) -> bool:
    """Whether a number was computed from sizes; not one that only may have been."""
    return isinstance(size.origin, FromExpression) and not getattr(size, "is_guess", False)


def _list_summands(size: Number) -> list[Number] | None:
    """Return the attributes and dimensions that a size is the sum of, in order; None if it is no sum of several."""
    if not isinstance(size.origin, FromExpression):
        return None
    summands: list[Number] = []
    waiting: list[Any] = [size]
    while waiting:
        number = waiting.pop(0)
        if not isinstance(number, Number):
            if number != 0:  # `sum` starts with 0
                return None
        elif not isinstance(number.origin, FromExpression):
            summands.append(number)
        elif number.origin.compute is operator.add:
            waiting = [*number.origin.inputs, *waiting]
        else:
            return None
    return summands if len(summands) > 1 else None


def _is_difference(size: Number) -> bool:
    """Whether a size is one minus another. If both are in proportion to it, so is the rest that is rounded off."""
    return isinstance(size.origin, FromExpression) and size.origin.is_difference


def follows_dimensions(size: Any) -> bool:
    """Whether a size is computed from dimensions of tensors, such as `x.shape[1] // 4`."""
    if not isinstance(size, Size) or not _is_computed(size) or find_quotient(size) is not None:
        return False
    return any(isinstance(leaf.origin, FromDimension) for leaf in find_leaves(size))


def _restore_origins(values: Any, known: Sequence[Mapping[int, Size]]) -> Any:
    if type(values) is int:
        return next((sizes[values] for sizes in known if values in sizes), values)
    if type(values) in (tuple, list):
        return type(values)(_restore_origins(value, known) for value in values)
    if type(values) is dict:
        return {key: _restore_origins(value, known) for key, value in values.items()}
    return values
