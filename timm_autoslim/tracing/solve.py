"""Solve the observations of a trace: which channels form a unit, which units a strand, which strands a group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from timm_autoslim.tracing.labels import AttributeUse, Kernel, Vector
from timm_autoslim.tracing.observe import Observations

# reasons why channels are fixed
UNUSED, OUTPUT = "not used in forward", "an output of the model"
OUT_OF_STEP = "their number cannot shrink in step with the channels that they are tied to"


@dataclass(frozen=True)
class Strand:
    """Units that occur at the same places of the same tensors, so that any two of them can swap.

    Attributes:
        size: number of units.
        group: index of the group that it belongs to.
        ratio: how many of its units are active for each step of the group's width.
        ordered: its channels are also matched by position (a channel shuffle), so that their order cannot change.
        producers: paths of the modules that produce these channels, in the order of execution.
    """

    size: int
    group: int
    ratio: int
    ordered: bool
    producers: tuple[str, ...]


@dataclass(frozen=True)
class Solution:
    """Units, strands and groups of a model.

    Attributes:
        unit: the unit of every atom.
        strand: the strand of every atom, -1 if it is fixed.
        rank: the rank of every atom's unit in its strand; a subnet keeps the lowest ranks.
        strands: all strands.
        sizes: for each group the number of steps of its width.
        names: for each group the module that produces its channels first.
        reasons: by unit, why it is fixed; a fixed unit without a reason is not used in forward.
        kernels: the kernels whose parts can shrink.
        conflicting_attributes: attributes that are the size of channels at one place and a fixed size at another.
    """

    unit: Vector
    strand: Vector
    rank: Vector
    strands: tuple[Strand, ...]
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    reasons: Mapping[int, str]
    kernels: tuple[Kernel, ...]
    conflicting_attributes: frozenset[str]


def solve(observations: Observations) -> Solution:
    """Return the units, strands and groups that all observations allow, as small as possible."""
    return _Solver(observations).solve()


@dataclass(frozen=True)
class _Partition:
    """Units by strand, and strands by group.

    Attributes:
        strand_of: the strand of every unit, -1 if it is fixed.
        sizes: number of units of each strand.
        members: by group (the index of one of its strands), the strands of the group.
        steps: by group, the number of steps of its width.
        rigid: units whose number cannot change.
    """

    strand_of: Vector
    sizes: NDArray[np.int64]
    members: Mapping[int, list[int]]
    steps: Mapping[int, int]
    rigid: Vector


class _Solver:
    """Solves one set of observations.

    Attributes:
        unit_of: the unit of every atom.
        count: how many units there are.
        frozen: for every unit whether it is frozen.
        reasons: by frozen unit, the first reason.
        kernels, conflicting_attributes: as in `Solution`, filled on the way.
    """

    def __init__(self, observations: Observations) -> None:
        self.observations = observations
        units, self.unit_of = np.unique(observations.roots, return_inverse=True)
        self.count = len(units)
        self.frozen: NDArray[np.bool_] = np.zeros(self.count, bool)
        self.reasons: dict[int, str] = {}
        self.kernels: list[Kernel] = []
        self.conflicting_attributes: set[str] = set()

    def solve(self) -> Solution:
        """Freeze, tie and classify units, until every group can shrink."""
        for vector, reason in self.observations.frozen_vectors:
            self._freeze_units(np.unique(self.unit_of[vector]), reason)
        self._freeze_kernels()
        vectors = [*self.observations.count_ties, *self._tie_attributes()]
        ties = [tuple(self.unit_of[v] for v in tie) for tie in vectors]
        in_tensors = self._find_units_in_tensors()
        while True:
            self._spread_freezes(ties)
            partition = self._partition(ties, in_tensors)
            if not len(partition.rigid):
                return self._build_solution(partition)
            self._freeze_units(partition.rigid, OUT_OF_STEP)

    def _freeze_units(self, units: Vector, reason: str) -> None:
        for unit in units[~self.frozen[units]]:
            self.reasons[int(unit)] = reason
        self.frozen[units] = True

    def _freeze_kernels(self) -> None:
        """Freeze the columns of matrices that are laid out as kernels: the parts of the kernel shrink instead.

        A kernel whose columns are frozen, or joined to anything else, cannot shrink: its parts are frozen too.
        """
        alone = np.bincount(self.unit_of, minlength=self.count) == 1
        for kernel in self.observations.kernels:
            units = self.unit_of[kernel.vector]
            parts = [v for v in kernel.parts if v is not None]
            if self.frozen[units].any() or not alone[units].all():
                for part in parts:
                    self._freeze_units(self.unit_of[part], "the weights of a kernel are also used as something else")
            else:
                self.kernels.append(kernel)
            self._freeze_units(units, "the columns of this matrix are the weights of a kernel")

    def _tie_attributes(self) -> list[tuple[Vector, ...]]:
        """Return a count tie for all vectors whose size is one attribute; freeze them if it is also a fixed size."""
        uses: dict[str, list[AttributeUse]] = defaultdict(list)
        for use in self.observations.attributes:
            uses[use.path].append(use)
        ties = []
        for path, uses_of_path in uses.items():
            vectors = [u.vector for u in uses_of_path if u.vector is not None]
            if len(vectors) < len(uses_of_path):
                self.conflicting_attributes |= {path} if vectors else set()
                for vector in vectors:
                    self._freeze_units(
                        self.unit_of[vector], f"the attribute {path} is also the size of a dimension that cannot shrink"
                    )
            elif len(vectors) > 1:
                ties.append(tuple(vectors))
        return ties

    def _find_units_in_tensors(self) -> NDArray[np.bool_]:
        """Return for every unit whether it occurs in a tensor of the model; others only tie units together."""
        in_tensors = np.zeros(self.count, bool)
        for vector in self.observations.vectors.values():
            in_tensors[self.unit_of[vector]] = True
        return in_tensors

    def _spread_freezes(self, ties: Sequence[tuple[Vector, ...]]) -> None:
        """Freeze all sides of a count tie of which one has frozen channels."""
        changed = True
        while changed:
            changed = False
            for tie in ties:
                sides = [self.frozen[v] for v in tie]
                if not any(side.any() for side in sides) or all(side.all() for side in sides):
                    continue
                first = np.sort(tie[0])
                if all(np.array_equal(first, np.sort(v)) for v in tie[1:]):
                    continue  # the same channels on both sides: their counts agree by themselves
                reason = next(self.reasons[int(u)] for v in tie for u in v if self.frozen[u])
                for v in tie:
                    self._freeze_units(v, f"their number is tied to the number of fixed channels ({reason})")
                changed = True

    # -- strands and groups -----------------------------------------------------------------------------------------

    def _partition(self, ties: Sequence[tuple[Vector, ...]], in_tensors: NDArray[np.bool_]) -> _Partition:
        """Form strands (units that occur at the same places) and groups (strands that are tied by count)."""
        ties = [tie for tie in ties if not self.frozen[tie[0]].any()]
        strand_of = np.full(self.count, -1, np.int64)
        free = np.flatnonzero(~self.frozen)
        _, strand_of[free] = np.unique(self._compute_signatures(ties)[free], return_inverse=True)
        sizes = np.bincount(strand_of[free], minlength=0)
        members = self._join_strands(ties, strand_of, sizes)
        steps = {root: gcd(*(int(sizes[s]) for s in strands)) for root, strands in members.items()}
        real = np.bincount(strand_of[free], in_tensors[free], minlength=len(sizes)) > 0
        rigid = [s for root, strands in members.items() if steps[root] < 2 or not real[strands].any() for s in strands]
        return _Partition(strand_of, sizes, members, steps, np.flatnonzero(np.isin(strand_of, rigid)))

    def _compute_signatures(self, ties: Sequence[tuple[Vector, ...]]) -> NDArray[np.uint64]:
        """Return a number for every unit; units with equal numbers occur at the same places.

        Every place has a random number. The number of a unit is the sum over its places.
        """
        rng = np.random.default_rng(0)
        signatures = np.zeros(self.count, np.uint64)
        observed = self.observations
        places = [*observed.vectors.values(), *(v for c in observed.contractions for v in c.vectors)]
        places += [use.vector for use in observed.attributes if use.vector is not None]
        for units in [*(self.unit_of[v] for v in places), *(v for tie in ties for v in tie)]:
            np.add.at(signatures, units, rng.integers(1, 2**63, dtype=np.uint64))
        return signatures

    @staticmethod
    def _join_strands(
        ties: Sequence[tuple[Vector, ...]], strand_of: Vector, sizes: NDArray[np.int64]
    ) -> Mapping[int, list[int]]:
        """Join strands that are tied by count to groups; return the strands by group, whose key is one of them."""
        parent = list(range(len(sizes)))

        def find(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for tie in ties:
            counts = [np.bincount(strand_of[v], minlength=len(sizes)) for v in tie]
            if all(np.array_equal(counts[0], c) for c in counts[1:]):
                continue
            strands = np.flatnonzero(sum(counts))
            for other in strands[1:]:
                parent[find(int(other))] = find(int(strands[0]))
        members: dict[int, list[int]] = defaultdict(list)
        for strand in range(len(sizes)):
            members[find(strand)].append(strand)
        return members

    # -- names and ranks --------------------------------------------------------------------------------------------

    def _build_solution(self, partition: _Partition) -> Solution:
        """Name the groups in the order of execution, and rank the units of each strand."""
        strand_of, producers = partition.strand_of, self.observations.producers
        rank_of = np.full(self.count, -1, np.int64)
        first_unit: list[int] = []
        for strand in range(len(partition.sizes)):
            units = np.flatnonzero(strand_of == strand)  # in order of their smallest atom
            rank_of[units] = np.arange(len(units))
            first_unit.append(int(units[0]))
        paths = self._list_producers(strand_of)
        first = {path: i for i, (path, _) in reversed(list(enumerate(producers)))}
        last = len(first) + len(producers)

        def start(root: int) -> tuple[int, int]:
            return min((first.get((paths[s] or [""])[0], last), first_unit[s]) for s in partition.members[root])

        ordered = np.zeros(self.count, bool)
        for vector in self.observations.ordered_vectors:
            ordered[self.unit_of[vector]] = True
        order = sorted(partition.members, key=start)
        strands: dict[int, Strand] = {}
        names: list[str] = []
        for group, root in enumerate(order):
            names.append(self._choose_name(partition, root, paths, first, names))
            for s in partition.members[root]:
                size = int(partition.sizes[s])
                in_order = bool(ordered[strand_of == s].any())
                strands[s] = Strand(size, group, size // partition.steps[root], in_order, tuple(paths[s]))
        return Solution(
            unit=self.unit_of,
            strand=strand_of[self.unit_of],
            rank=rank_of[self.unit_of],
            strands=tuple(strands[s] for s in range(len(partition.sizes))),
            sizes=tuple(partition.steps[root] for root in order),
            names=tuple(names),
            reasons=self.reasons,
            kernels=tuple(self.kernels),
            conflicting_attributes=frozenset(self.conflicting_attributes),
        )

    def _list_producers(self, strand_of: Vector) -> dict[int, list[str]]:
        """Return by strand the modules that produce its channels, in the order of execution."""
        paths: dict[int, list[str]] = defaultdict(list)
        for path, vector in self.observations.producers:
            for strand in np.unique(strand_of[self.unit_of[vector]]):
                if strand >= 0 and path not in paths[int(strand)]:
                    paths[int(strand)].append(path)
        return paths

    def _choose_name(
        self,
        partition: _Partition,
        root: int,
        producers: Mapping[int, list[str]],
        first: Mapping[str, int],
        names: Sequence[str],
    ) -> str:
        """Name a group after the module that produces its channels first and names no other group.

        One that no module but the model itself produces has the name of a tensor.
        """
        strands = partition.members[root]
        paths = sorted({path for s in strands for path in producers[s] if path}, key=lambda path: first[path])
        if not paths:
            paths = [
                next(
                    name
                    for (name, _), vector in self.observations.vectors.items()
                    if np.isin(partition.strand_of[self.unit_of[vector]], strands).any()
                )
            ]
        for path in paths:
            if path not in names:
                return path
        return next(f"{paths[0]}:{i}" for i in range(2, len(names) + 3) if f"{paths[0]}:{i}" not in names)
