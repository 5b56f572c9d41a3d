"""Solve what a trace observed: which channels form one unit, which units one strand, which strands one width."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from timm_autoslim.tracing.flow import Contraction, Flow
from timm_autoslim.tracing.formulas import Place
from timm_autoslim.tracing.labels import AttributeUse, Kernel, Label, Vector

UNUSED = "not used in forward"


@dataclass(frozen=True)
class Observations:
    """What a trace observed of a model.

    Attributes:
        roots: for every atom the representative of its unit.
        frozen: (atoms, reason): these channels must stay.
        proportional: vectors whose active counts must keep the proportion of their lengths.
        ordered: vectors whose channels are matched by position, so that they must keep their order.
        attributes: attributes that the forward takes sizes from.
        descriptions: attributes that only describe a module; users and timm read them.
        producers: (module path, vector): the module produces these channels, in the order of execution.
        contractions: the matrix products and convolutions.
        kernels: last axes of weight matrices that are laid out as kernels.
        vectors: the atoms of every axis that carries channels.
        shapes: shape by name of every parameter, buffer and tensor attribute.
        parameters: names of the parameters among them.
        tied: for every further name of a tied tensor, the name that it has in `shapes`.
    """

    roots: Vector
    frozen: tuple[tuple[Vector, str], ...]
    proportional: tuple[tuple[Vector, ...], ...]
    ordered: tuple[Vector, ...]
    attributes: tuple[AttributeUse, ...]
    descriptions: tuple[AttributeUse, ...]
    producers: tuple[tuple[str, Vector], ...]
    contractions: tuple[Contraction, ...]
    kernels: tuple[Kernel, ...]
    vectors: Mapping[Place, Vector]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    tied: Mapping[str, str]


def observe(
    flow: Flow,
    labels: Mapping[str, Sequence[Label]],
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Sequence[str],
    descriptions: Sequence[AttributeUse] = (),
    tied: Mapping[str, str] | None = None,
) -> Observations:
    """Return what a trace observed so far, as a value.

    Args:
        flow: the trace.
        labels: by tensor name, one label for each axis.
        shapes, parameters, descriptions, tied: as in `Observations`.
    """
    constraints = flow.constraints
    return Observations(
        roots=flow.atoms.roots(),
        frozen=tuple(constraints.frozen),
        proportional=tuple(constraints.proportional),
        ordered=tuple(constraints.ordered),
        attributes=tuple(constraints.attributes),
        descriptions=tuple(descriptions),
        producers=tuple(constraints.producers),
        contractions=tuple(flow.contractions),
        kernels=tuple(flow.kernels.values()),
        vectors={(name, axis): v for name, axes in labels.items() for axis, v in enumerate(axes) if v is not None},
        shapes=dict(shapes),
        parameters=tuple(parameters),
        tied=dict(tied or {}),
    )


@dataclass(frozen=True)
class Strand:
    """Units that occur at the same places of the same tensors, so that any two of them can swap.

    Attributes:
        size: number of units.
        group: index of the group whose width decides how many units are active.
        ratio: active units for each step of the group's width.
        ordered: channels are also matched by position (a channel shuffle), so their order must stand.
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
        rank: the place of every atom's unit in its strand; the first ones stay longest.
        strands: all strands.
        sizes: for each group the number of steps of its width.
        names: for each group the module that produces its channels first.
        reasons: by unit, why it is fixed; a fixed unit without a reason is not used in forward.
        kernels: the kernels whose parts are channels.
        torn: attributes that give the size of channels at one place and a fixed size at another.
    """

    unit: Vector
    strand: Vector
    rank: Vector
    strands: tuple[Strand, ...]
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    reasons: Mapping[int, str]
    kernels: tuple[Kernel, ...]
    torn: frozenset[str]


def solve(observations: Observations) -> Solution:
    """Return the finest units, strands and groups that keep to all observations."""
    return _Solver(observations).solve()


@dataclass(frozen=True)
class _Partition:
    """Units by strand, and strands by group.

    Attributes:
        strand_of: the strand of every unit, -1 if it is fixed.
        sizes: number of units of each strand.
        members: by group (the index of one of its strands), the strands of the group.
        steps: by group, the number of steps of its width.
        stuck: units whose number cannot change.
    """

    strand_of: Vector
    sizes: NDArray[np.int64]
    members: Mapping[int, list[int]]
    steps: Mapping[int, int]
    stuck: Vector


class _Solver:
    def __init__(self, observations: Observations) -> None:
        self.observations = observations
        units, self.unit_of = np.unique(observations.roots, return_inverse=True)  # unit by atom
        self.count = len(units)
        self.frozen: NDArray[np.bool_] = np.zeros(self.count, bool)
        self.reasons: dict[int, str] = {}
        self.kernels: list[Kernel] = []
        self.torn: set[str] = set()

    def solve(self) -> Solution:
        for vector, reason in self.observations.frozen:
            self._freeze(np.unique(self.unit_of[vector]), reason)
        self._freeze_kernels()
        vectors = [*self.observations.proportional, *self._attribute_ties()]
        ties = [tuple(self.unit_of[v] for v in tie) for tie in vectors]
        placed = self._placed()
        while True:
            self._spread(ties)
            partition = self._classify(ties, placed)
            if not len(partition.stuck):
                return self._describe(partition)
            self._freeze(partition.stuck, "its number of channels cannot change in step with what it is tied to")

    def _freeze(self, units: Vector, reason: str) -> None:
        for unit in units[~self.frozen[units]]:
            self.reasons[int(unit)] = reason
        self.frozen[units] = True

    def _freeze_kernels(self) -> None:
        """The atoms of a weight that is laid out as a kernel are no channels of their own: its parts are."""
        alone = np.bincount(self.unit_of, minlength=self.count) == 1
        for kernel in self.observations.kernels:
            units = self.unit_of[kernel.vector]
            parts = [v for v in kernel.parts if v is not None]
            if self.frozen[units].any() or not alone[units].all():
                for part in parts:
                    self._freeze(self.unit_of[part], "a flat kernel that is also used otherwise")
            else:
                self.kernels.append(kernel)
            self._freeze(units, "a flat kernel")

    def _attribute_ties(self) -> list[tuple[Vector, ...]]:
        """All sizes that one attribute gives must change in proportion; with a fixed one among them, none can."""
        uses: dict[str, list[AttributeUse]] = defaultdict(list)
        for use in self.observations.attributes:
            uses[use.path].append(use)
        ties = []
        for path, of_path in uses.items():
            vectors = [u.vector for u in of_path if u.vector is not None]
            if len(vectors) < len(of_path):
                self.torn |= {path} if vectors else set()
                for vector in vectors:
                    self._freeze(self.unit_of[vector], f"the attribute {path} also gives a fixed size")
            elif len(vectors) > 1:
                ties.append(tuple(vectors))
        return ties

    def _placed(self) -> NDArray[np.bool_]:
        """Units that occur in a tensor of the model; the others only tie some of them together."""
        placed = np.zeros(self.count, bool)
        for vector in self.observations.vectors.values():
            placed[self.unit_of[vector]] = True
        return placed

    def _spread(self, ties: Sequence[tuple[Vector, ...]]) -> None:
        """Where one side of a count tie holds fixed channels, no side can change."""
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
                    self._freeze(v, f"tied by count to fixed channels ({reason})")
                changed = True

    # -- strands and groups -----------------------------------------------------------------------------------------

    def _classify(self, ties: Sequence[tuple[Vector, ...]], placed: NDArray[np.bool_]) -> _Partition:
        """Form strands (units that occur at the same places) and groups (strands that are tied by count)."""
        ties = [tie for tie in ties if not self.frozen[tie[0]].any()]
        strand_of = np.full(self.count, -1, np.int64)
        free = np.flatnonzero(~self.frozen)
        _, strand_of[free] = np.unique(self._signatures(ties)[free], return_inverse=True)
        sizes = np.bincount(strand_of[free], minlength=0)
        members = self._groups(ties, strand_of, sizes)
        steps = {root: gcd(*(int(sizes[s]) for s in strands)) for root, strands in members.items()}
        real = np.bincount(strand_of[free], placed[free], minlength=len(sizes)) > 0
        stuck = [s for root, strands in members.items() if steps[root] < 2 or not real[strands].any() for s in strands]
        return _Partition(strand_of, sizes, members, steps, np.flatnonzero(np.isin(strand_of, stuck)))

    def _signatures(self, ties: Sequence[tuple[Vector, ...]]) -> NDArray[np.uint64]:
        """A random number for every place, added up over the places of each unit: equal sums are equal places."""
        rng = np.random.default_rng(0)
        signatures = np.zeros(self.count, np.uint64)
        seen = self.observations
        places = [*seen.vectors.values(), *(v for c in seen.contractions for v in c.vectors)]
        places += [use.vector for use in seen.attributes if use.vector is not None]
        for units in [*(self.unit_of[v] for v in places), *(v for tie in ties for v in tie)]:
            np.add.at(signatures, units, rng.integers(1, 2**63, dtype=np.uint64))
        return signatures

    @staticmethod
    def _groups(
        ties: Sequence[tuple[Vector, ...]], strand_of: Vector, sizes: NDArray[np.int64]
    ) -> Mapping[int, list[int]]:
        """Join strands that are tied by count."""
        parent = list(range(len(sizes)))

        def find(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for tie in ties:
            counts = [np.bincount(strand_of[v], minlength=len(sizes)) for v in tie]
            if all(np.array_equal(counts[0], c) for c in counts[1:]):
                continue
            touched = np.flatnonzero(sum(counts))
            for other in touched[1:]:
                parent[find(int(other))] = find(int(touched[0]))
        members: dict[int, list[int]] = defaultdict(list)
        for strand in range(len(sizes)):
            members[find(strand)].append(strand)
        return members

    # -- names and ranks --------------------------------------------------------------------------------------------

    def _describe(self, partition: _Partition) -> Solution:
        """Name the groups in the order of execution, and rank the units of each strand."""
        strand_of, producers = partition.strand_of, self.observations.producers
        rank_of = np.full(self.count, -1, np.int64)
        for strand in range(len(partition.sizes)):
            units = np.flatnonzero(strand_of == strand)  # in order of their smallest atom
            rank_of[units] = np.arange(len(units))
        makers: dict[int, list[str]] = defaultdict(list)
        for path, vector in producers:
            for strand in np.unique(strand_of[self.unit_of[vector]]):
                if strand >= 0 and path not in makers[int(strand)]:
                    makers[int(strand)].append(path)
        first = {path: i for i, (path, _) in reversed(list(enumerate(producers)))}
        last = len(first) + len(producers)

        def start(root: int) -> tuple[int, int]:
            return min((first.get((makers[s] or [""])[0], last), s) for s in partition.members[root])

        ordered = np.zeros(self.count, bool)
        for vector in self.observations.ordered:
            ordered[self.unit_of[vector]] = True
        order = sorted(partition.members, key=start)
        strands: dict[int, Strand] = {}
        names: list[str] = []
        for group, root in enumerate(order):
            names.append(self._name(partition, root, makers, first, names))
            for s in partition.members[root]:
                size = int(partition.sizes[s])
                keeps_order = bool(ordered[strand_of == s].any())
                strands[s] = Strand(size, group, size // partition.steps[root], keeps_order, tuple(makers[s]))
        return Solution(
            unit=self.unit_of,
            strand=strand_of[self.unit_of],
            rank=rank_of[self.unit_of],
            strands=tuple(strands[s] for s in range(len(partition.sizes))),
            sizes=tuple(partition.steps[root] for root in order),
            names=tuple(names),
            reasons=self.reasons,
            kernels=tuple(self.kernels),
            torn=frozenset(self.torn),
        )

    def _name(
        self,
        partition: _Partition,
        root: int,
        makers: Mapping[int, list[str]],
        first: Mapping[str, int],
        names: Sequence[str],
    ) -> str:
        """Name a group after the module that produces its channels first and names no other group."""
        strands = partition.members[root]
        paths = sorted({path for s in strands for path in makers[s]}, key=lambda path: first[path])
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
