"""The channel graph of a model: a value with the slices and the cost of the model at any widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from timm_autoslim.slicing.attributes import Value
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.slicing.tensors import Axis
from timm_autoslim.tracing.dependence import name_parts
from timm_autoslim.tracing.formulas import (
    AttributeFormula,
    Count,
    KernelLength,
    Length,
    Place,
    Product,
    Terms,
    make_size_terms,
)
from timm_autoslim.tracing.labels import AttributeUse, Contraction, Kernel, Vector
from timm_autoslim.tracing.observe import Observations
from timm_autoslim.tracing.solve import UNUSED, Solution, Strand, solve


@dataclass(frozen=True, eq=False)
class AxisUnits:
    """The units of one axis of one tensor.

    Attributes:
        strand: the strand at every index, -1 if it is fixed.
        rank: the rank in its strand at every index.
        prefix: the strand, if the axis is one strand in the order of ranks, so that a subnet keeps the first indices;
            else None.
    """

    strand: Vector
    rank: Vector
    prefix: int | None


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The channel-dependency graph of a model, solved. It never changes: `freeze` returns another graph.

    Two graphs are equal if they give the same slices, costs and reasons at all widths.

    Attributes:
        observations: what the trace observed.
        solution: the units, strands and groups that follow from it.
        floor: the narrowest width that the proof could run; 1 for nearly every model.
        least_widths: (vector, width, reason): the group of these channels is never narrower.
    """

    observations: Observations
    solution: Solution
    floor: int = 1
    least_widths: tuple[tuple[Vector, int, str], ...] = ()

    @classmethod
    def from_observations(cls, observations: Observations, floor: int = 1) -> ChannelGraph:
        """Return the graph of the observations of a trace."""
        return cls(observations, solve(observations), floor)

    def freeze(self, vectors: Sequence[Vector | None], reason: str) -> ChannelGraph:
        """Return a graph in which these channels are fixed as well; None stands for a dimension without channels."""
        frozen_vectors = list(self.observations.frozen_vectors)
        frozen_vectors += [(vector, reason) for vector in vectors if vector is not None]
        observations = replace(self.observations, frozen_vectors=tuple(frozen_vectors))
        return replace(self, observations=observations, solution=solve(observations))

    def unfreeze(self, reasons: Sequence[str]) -> ChannelGraph:
        """Return a graph in which what was frozen for these reasons is free, unless something else fixes it."""
        frozen_vectors = tuple(item for item in self.observations.frozen_vectors if item[1] not in reasons)
        observations = replace(self.observations, frozen_vectors=frozen_vectors)
        return replace(self, observations=observations, solution=solve(observations))

    def keep_width(self, vector: Vector, width: int, reason: str) -> ChannelGraph:
        """Return a graph in which the group of these channels is never narrower than `width`."""
        return replace(self, least_widths=(*self.least_widths, (vector, width, reason))) if width > 1 else self

    def freeze_tensors(self, names: Sequence[str], reason: str) -> ChannelGraph:
        """Return a graph in which all channels of these tensors are fixed as well."""
        places = [(name, axis) for name in names for axis in range(len(self.shapes[name]))]
        return self.freeze([self.observations.vectors.get(place) for place in places], reason)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelGraph) or self._facts != other._facts:
            return False
        return all(
            np.array_equal(a.strand, b.strand) and np.array_equal(a.rank, b.rank)
            for a, b in zip(self.places.values(), other.places.values(), strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.names, self.group_sizes))

    @cached_property
    def _facts(self) -> tuple[object, ...]:
        """Everything that equal graphs have in common, except the units of every axis."""
        return (
            *(self.names, self.group_sizes, self.floors, self.strands, self.shapes, self.parameters, self.tied_names),
            *(self.fixed, self.lengths, self.producers, self.attributes, self.products, list(self.places)),
            self.floor_reasons,
        )

    # -- what the model is ------------------------------------------------------------------------------------------

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name of every parameter, buffer and tensor attribute; a tied tensor has one name."""
        return self.observations.shapes

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return self.observations.parameters

    @property
    def tied_names(self) -> Mapping[str, str]:
        """For every further name of a tied tensor, the name that it has in `shapes`."""
        return self.observations.tied_names

    @cached_property
    def dropped(self) -> tuple[str, ...]:
        """The modules, or else weights, that the forward runs and that no output depends on."""
        return tuple(name_parts(self.observations.dropped, self.parameters))

    @property
    def strands(self) -> tuple[Strand, ...]:
        """All strands."""
        return self.solution.strands

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The widest width of every group."""
        return self.solution.sizes

    @cached_property
    def floors(self) -> list[int]:
        """The narrowest width of every group."""
        floors = [min(self.floor, max(1, n // 2)) for n in self.group_sizes]
        for group, (width, _) in self._least_by_group.items():
            floors[group] = max(floors[group], width)
        return floors

    @property
    def half_widths(self) -> list[int]:
        """Half of the widest width of every group, or its narrowest width if that is more."""
        return [max(floor, n // 2) for floor, n in zip(self.floors, self.group_sizes, strict=True)]

    @property
    def floor_reasons(self) -> dict[int, str]:
        """For every group whose narrowest width the model's code decides, why."""
        return {group: reason for group, (_, reason) in self._least_by_group.items()}

    @cached_property
    def _least_by_group(self) -> dict[int, tuple[int, str]]:
        """For every group with a least width, the largest of them, and its reason."""
        least: dict[int, tuple[int, str]] = {}
        for vector, width, reason in self.least_widths:
            for group, _ in self.make_count(vector).terms:
                if width > least.get(group, (1, ""))[0]:
                    least[group] = min(width, self.group_sizes[group]), reason
        return least

    @property
    def names(self) -> tuple[str, ...]:
        """The name of every group: the module that produces its channels first."""
        return self.solution.names

    @property
    def conflicting_attributes(self) -> frozenset[str]:
        """Attributes that are the size of channels at one place and a fixed size at another."""
        return self.solution.conflicting_attributes

    @cached_property
    def places(self) -> dict[Place, AxisUnits]:
        """The units of every axis that carries channels."""
        return {place: self._find_units(vector) for place, vector in self.observations.vectors.items()}

    def _find_units(self, vector: Vector) -> AxisUnits:
        strand, rank = self.solution.strand[vector], self.solution.rank[vector]
        in_order = strand[0] >= 0 and (strand == strand[0]).all() and np.array_equal(rank, np.arange(len(rank)))
        return AxisUnits(strand, rank, int(strand[0]) if in_order else None)

    # -- fixed channels ----------------------------------------------------------------------------------------------

    @cached_property
    def fixed(self) -> dict[Place, str]:
        """For every axis of which no channel can be removed, the reason."""
        solution, vectors = self.solution, self.observations.vectors
        of_kernels = {id(kernel.vector) for kernel in solution.kernels}
        fixed = {
            place: solution.reasons.get(int(solution.unit[vector[0]]), UNUSED)
            for place, vector in vectors.items()
            if (solution.strand[vector] < 0).all() and id(vector) not in of_kernels
        }
        names = {name for name, _ in vectors}
        return fixed | {(n, 0): "none of its axes carries channels" for n in self.parameters if n not in names}

    def find_reason(self, path: str) -> str:
        """Return why the channels that a module produces are fixed."""
        vector = next(v for p, v in self.observations.producers if p == path)
        return self._find_reason(vector) or "it is not fixed"

    def find_vector(self, group: int) -> Vector:
        """Return channels that the width of a group decides."""
        vectors = self.observations.vectors.values()
        return next(v for v in vectors if any(g == group for g, _ in self.make_count(v).terms))

    def _find_reason(self, vector: Vector) -> str | None:
        """Return why channels of `vector` are fixed, or None if none is."""
        fixed = self.solution.unit[vector[self.solution.strand[vector] < 0]]
        return self.solution.reasons.get(int(fixed[0]), UNUSED) if len(fixed) else None

    # -- numbers as functions of the widths -------------------------------------------------------------------------

    def make_count(self, vector: Vector) -> Count:
        """Return the active length of `vector` as a function of the widths."""
        strands = self.solution.strand[vector]
        terms: dict[int, int] = defaultdict(int)
        for index, times in zip(*np.unique(strands[strands >= 0], return_counts=True), strict=True):
            strand = self.strands[int(index)]
            terms[strand.group] += int(times) // strand.size * strand.ratio
        return Count(int((strands < 0).sum()), tuple(sorted(terms.items())))

    def _make_kernel_length(self, kernel: Kernel) -> KernelLength:
        fixed = prod(n for n, part in zip(kernel.shape, kernel.parts, strict=True) if part is None)
        return KernelLength(fixed, tuple(self.make_count(part) for part in kernel.parts if part is not None))

    @cached_property
    def _kernels(self) -> dict[int, Kernel]:
        """Kernels by their first atom."""
        return {int(kernel.vector[0]): kernel for kernel in self.solution.kernels}

    @cached_property
    def lengths(self) -> dict[Place, Length]:
        """The active length of every axis that can shrink."""
        lengths: dict[Place, Length] = {}
        for place, vector in self.observations.vectors.items():
            if int(vector[0]) in self._kernels:
                lengths[place] = self._make_kernel_length(self._kernels[int(vector[0])])
            elif (self.solution.strand[vector] >= 0).any():
                lengths[place] = self.make_count(vector)
        return lengths

    @cached_property
    def producers(self) -> dict[str, Count]:
        """The number of channels that each module produces."""
        counts: dict[str, Count] = {}
        for path, vector in self.observations.producers:
            counts.setdefault(path, self.make_count(vector))
        return counts

    @cached_property
    def attributes(self) -> dict[str, AttributeFormula]:
        """Attributes that change with the widths, by path: those that describe modules, and those of forward."""
        return {
            **self._make_formulas(self.observations.descriptions),
            **self._make_formulas(self.observations.attributes),
        }

    def _make_formulas(self, uses: Sequence[AttributeUse]) -> dict[str, AttributeFormula]:
        """Return the formulas of those attributes that change with the widths; the first use of a path counts."""
        formulas: dict[str, AttributeFormula] = {}
        for use in uses:
            if use.vector is not None and (self.solution.strand[use.vector] >= 0).any():
                formula = AttributeFormula(use.value, len(use.vector), self.make_count(use.vector), use.power)
                formulas.setdefault(use.path, formula)
        return formulas

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """The MACs of every matrix product and convolution for one image, in the order of execution."""
        return tuple(map(self._make_product, self.observations.contractions))

    def _make_product(self, contraction: Contraction) -> Product:
        constant, counts, reasons = contraction.constant, [], []
        for vector in contraction.vectors:
            kernel = self._kernels.get(int(vector[0]))
            parts = [vector] if kernel is None else [v for v in kernel.parts if v is not None]
            constant *= 1 if kernel is None else self._make_kernel_length(kernel).constant
            counts += [self.make_count(part) for part in parts]
            reasons += [reason for part in parts if (reason := self._find_reason(part))]
        return Product(contraction.path, constant, tuple(counts), reasons[-1] if reasons else None)

    @cached_property
    def _mac_terms(self) -> Terms:
        lengths: dict[Count, int] = {}
        rows = [(1, 1, tuple(lengths.setdefault(c, len(lengths)) for c in p.counts)) for p in self.products]
        return Terms(list(lengths), len(self.group_sizes), rows)

    @cached_property
    def _mac_constants(self) -> list[float]:
        return [product.constant for product in self.products]

    def macs(self, widths: Sequence[int]) -> int:
        """Return the MACs of one image at these widths, one for each group."""
        return round(float(self._mac_terms(widths) @ self._mac_constants))

    @cached_property
    def _parameter_terms(self) -> Terms:
        return self.make_size_terms({name: (1, *self.shapes[name]) for name in self.parameters})

    def params(self, widths: Sequence[int]) -> int:
        """Return the number of parameters at these widths, one for each group."""
        return int(self._parameter_terms(widths).sum())

    def make_size_terms(self, tensors: Mapping[str, tuple[int, ...]]) -> Terms:
        """Return the sizes of tensors (by name, a factor and the shape) as functions of the widths."""
        return make_size_terms(self.lengths, len(self.group_sizes), tensors)

    def compute_share_at_half(self) -> float:
        """Return the share of the MACs that is left at half of every width, without rounding."""
        widest = self.group_sizes
        macs = sum(p.constant * prod((c.fixed + c(widest)) / 2 for c in p.counts) for p in self.products)
        return macs / max(1, self.macs(widest))

    # -- slices -----------------------------------------------------------------------------------------------------

    def find_active(self, widths: Sequence[int]) -> NDArray[np.bool_]:
        """Return for every atom whether it is active at these widths."""
        strand, rank = self.solution.strand, self.solution.rank
        limits = np.array([s.ratio * widths[s.group] for s in self.strands] + [0], np.int64)  # strand -1 is fixed
        active = (strand < 0) | (rank < limits[strand])
        for kernel in self.solution.kernels:
            inside: NDArray[np.bool_] = np.ones(kernel.shape, bool)
            for axis, part in enumerate(kernel.parts):
                if part is not None:
                    inside &= active[part].reshape([-1 if i == axis else 1 for i in range(len(kernel.shape))])
            active[kernel.vector] = inside.ravel()
        return active

    def slices(self, widths: Sequence[int]) -> Slices:
        """Return the slices of the tensors and the values of the attributes at these widths, one for each group."""
        active = None
        tensors: dict[str, tuple[Axis, ...]] = {}
        for (name, axis), length in self.lengths.items():
            prefix, size = self.places[name, axis].prefix, self.shapes[name][axis]
            runs: Axis
            if prefix is not None:
                strand = self.strands[prefix]
                runs = ((0, strand.ratio * widths[strand.group]),)
                if runs[0][1] == size:
                    continue
            else:
                if length(widths) == size:
                    continue
                if active is None:
                    active = self.find_active(widths)
                runs = find_runs(active[self.observations.vectors[name, axis]])
            axes = list(tensors.get(name, (None,) * len(self.shapes[name])))
            axes[axis] = runs
            tensors[name] = tuple(axes)
        tensors |= {name: tensors[first] for name, first in self.tied_names.items() if first in tensors}
        attributes: dict[str, Value] = {}
        for path, formula in self.attributes.items():
            value = formula(widths)
            if value != formula.value:
                attributes[path] = value
        return Slices(tensors, attributes)


def find_runs(mask: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """Return the runs (start, length) of true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return tuple((int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True))
