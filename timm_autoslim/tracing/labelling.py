"""The labels of the tensors of a trace, the constraints on their channels, and the steps that every rule takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from timm_autoslim.tracing.calls import FunctionCall
from timm_autoslim.tracing.labels import Atoms, Constraints, Contraction, Label, Vector
from timm_autoslim.utils.running import ModuleStack

Labels = list[Label]


class Labelling:
    """The labels by tensor, the constraints so far, and the module that is running.

    Attributes:
        contracted_vectors: by module, the vectors that its products of two activations sum over.
        atoms: the union-find of all channels.
        constraints: what else the trace learned about the channels.
        contractions: matrix products and convolutions, while `count_macs` is set.
        images: how many images the products are for; MACs are counted for one.
        call: the torch function that is running.
        stack: the modules that are running.
    """

    def __init__(self) -> None:
        self.contracted_vectors: dict[str, list[Vector]] = {}
        self.atoms = Atoms()
        self.constraints = Constraints()
        self.contractions: list[Contraction] = []
        self.call = FunctionCall("", (), {})
        self.stack = ModuleStack()
        self.count_macs = False
        self.images = 1
        self._frozen_count = 0  # how many entries of the constraints `_frozen_atoms` covers
        self._frozen_atoms: Vector = np.zeros(0, np.int64)
        self._labels: dict[int, tuple[Tensor, Labels]] = {}  # the tensor is kept alive: ids are reused otherwise
        self._rows: dict[int, tuple[Tensor, Sequence[Vector]]] = {}  # tensors of which each row has other channels
        self._new: set[int] = set()  # the first atoms of new dimensions
        self._indices: dict[int, tuple[Tensor, Labels]] = {}  # tensors that hold indices of channels

    @property
    def path(self) -> str:
        """The module that is running."""
        return self.stack.path

    # -- labels -------------------------------------------------------------------------------------------------

    def get_labels(self, tensor: Tensor) -> Labels:
        """Return one label for each dimension of `tensor`."""
        if self.stack.idle:  # it is an output of the model
            self.mark_read(tensor)
        entry = self._labels.get(id(tensor))
        return list(entry[1]) if entry else [None] * tensor.dim()

    def set_labels(self, tensor: Tensor, labels: Sequence[Label]) -> None:
        """Set the labels of `tensor`; a dimension of length 1 never carries channels."""
        shape = tensor.shape
        assert len(labels) == len(shape), (self.call.name, len(labels), tuple(shape))
        entry: Labels = []
        for label, size in zip(labels, shape, strict=True):
            assert label is None or len(label) == size, (self.call.name, len(label), size)
            entry.append(None if size == 1 else label)
        self._labels[id(tensor)] = (tensor, entry)

    def create_labels(self, tensor: Tensor) -> Labels:
        """Label every dimension of `tensor` with new atoms, and return the labels."""
        labels: Labels = [self.atoms.create(n) if n > 1 else None for n in tensor.shape]
        self.set_labels(tensor, labels)
        return self.get_labels(tensor)

    def mark_indices(self, tensor: Tensor, labels: Labels) -> None:
        """Note that `tensor` holds indices of the channels of `labels`; they are frozen if anything reads it."""
        self._indices[id(tensor)] = (tensor, labels)

    def mark_rows(self, tensor: Tensor, rows: Sequence[Vector]) -> None:
        """Note that each row of `tensor` has other channels; they become one if anything reads it."""
        self._rows[id(tensor)] = (tensor, rows)

    def mark_read(self, tensor: Tensor) -> None:
        """Note that the model reads `tensor`."""
        if id(tensor) in self._indices:
            self.freeze_labels(self._indices[id(tensor)][1], "it returns indices of these channels")
        for row in self._rows[id(tensor)][1] if id(tensor) in self._rows else ():
            self.atoms.join(self._rows[id(tensor)][1][0], row)

    def is_new(self, label: Vector) -> bool:
        """Whether these are channels of a tensor of equal numbers, that the code made and nothing else has joined."""
        return int(label[0]) in self._new and np.array_equal(self.atoms.find(label), label)

    def forget_new(self, label: Vector) -> None:
        """Note that the tensor that the code made of these channels is not one of equal numbers."""
        self._new.discard(int(label[0]))

    # -- steps --------------------------------------------------------------------------------------------------

    def freeze_label(self, label: Label, reason: str) -> None:
        """Freeze the channels of `label`; the reason starts with the path of the running module."""
        self.constraints.freeze(label, f"{self.path or 'the model'}: {reason}")

    def freeze_labels(self, labels: Sequence[Label], reason: str) -> None:
        """Freeze the channels of each of `labels`."""
        for label in labels:
            self.freeze_label(label, reason)

    def is_frozen(self, label: Vector) -> bool:
        """Whether all channels of `label` are frozen so far."""
        vectors = self.constraints.frozen_vectors
        if len(vectors) != self._frozen_count:
            self._frozen_count = len(vectors)
            self._frozen_atoms = np.unique(np.concatenate([v for v, _ in vectors]))
        if not len(self._frozen_atoms):
            return False
        frozen = np.zeros(len(self.atoms), bool)
        frozen[self.atoms.find(self._frozen_atoms)] = True
        return bool(frozen[self.atoms.find(label)].all())

    def join(self, a: Label, b: Label, what: str) -> Label:
        """Make one unit of the channels at each index of two dimensions, and return their label.

        Args:
            a, b: labels of two dimensions of equal length; one without channels freezes the other.
            what: the function or operator that combines them, for the reason.
        """
        if a is None or b is None:
            label = a if b is None else b
            self.freeze_label(label, f"{what} combines these channels with a dimension that cannot shrink")
            return label
        self.atoms.join(a, b)
        return a

    def broadcast(self, tensors: Sequence[Tensor], out_shape: Sequence[int], what: str) -> Labels:
        """Join the labels of `tensors` dimension by dimension, aligned at the right."""
        out: Labels = []
        for position in range(-len(out_shape), 0):
            wide = [t for t in tensors if t.dim() >= -position and t.shape[position] != 1]
            dims = [self.get_labels(t)[position] for t in wide]
            label = dims[0] if dims else None
            for other in dims[1:]:
                if label is not None or other is not None:
                    label = self.join(label, other, what)
            out.append(label)
        return out

    def add_producer(self, label: Label) -> None:
        """Note that the running module produces these channels."""
        if label is not None:
            self.constraints.producers.append((self.path, label))

    def add_contraction(self, constant: float, sizes: Sequence[tuple[int, Label]]) -> None:
        """Count the MACs of a product over dimensions of these lengths."""
        if not self.count_macs:
            return
        vectors = []
        for length, label in sizes:
            if label is None:
                constant *= length
            else:
                vectors.append(label)
        self.contractions.append(Contraction(self.path, constant / self.images, tuple(vectors)))
