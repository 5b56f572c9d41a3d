"""Solve a trace's constraints: which channels form one width, and what each tensor keeps at given widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from timm_autoslim.slicing.attributes import Value
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.slicing.tensors import Axis
from timm_autoslim.tracing.flow import Contraction, Flow
from timm_autoslim.tracing.labels import AttributeUse, Kernel, Vector

Place = tuple[str, int]  # a tensor's name and one of its axes


@dataclass(frozen=True)
class Strand:
    """Channels that occur at the same places and can be permuted among each other.

    Attributes:
        size: number of units; a unit is the set of channels that live and die together.
        group: index of the group whose width decides how many units are active.
        ratio: active units for each step of the group's width.
        ordered: the channels are also matched by position (a channel shuffle), so their order must stand.
        producers: paths of the modules that produce these channels, in the order of execution.
    """

    size: int
    group: int
    ratio: int
    ordered: bool
    producers: tuple[str, ...]


@dataclass(frozen=True)
class Count:
    """The active length of a vector as a function of the widths: `fixed + sum(factor * width[group])`."""

    fixed: int
    terms: tuple[tuple[int, int], ...]

    def __call__(self, widths: Sequence[int]) -> int:
        """Return the active length at these widths, one for each group."""
        return self.fixed + sum(factor * widths[group] for group, factor in self.terms)


@dataclass(frozen=True)
class Area:
    """The active length of an axis that is laid out as a kernel: `constant` times the product of the counts."""

    constant: int
    counts: tuple[Count, ...]

    def __call__(self, widths: Sequence[int]) -> int:
        """Return the active length at these widths, one for each group."""
        return self.constant * prod(count(widths) for count in self.counts)


@dataclass(frozen=True)
class Scaled:
    """A module attribute as a function of the widths: it follows the active share of `length` channels."""

    value: int | float
    length: int
    count: Count
    power: float

    def __call__(self, widths: Sequence[int]) -> int | float:
        """Return the attribute's value at these widths."""
        active = self.count(widths)
        if self.power == 1:
            return int(self.value) * active // self.length
        if active == self.length:
            return self.value
        return float(active**self.power * (self.value / self.length**self.power))


@dataclass(frozen=True)
class Product:
    """MACs of one contraction for one image: `constant` times the product of the counts."""

    path: str
    constant: float
    counts: tuple[Count, ...]
    held: str | None  # why channels of it are fixed, if some are


@dataclass(frozen=True)
class Place_:
    """What is known about one axis of one tensor: strand and rank by index (strand -1 is fixed)."""

    strand: Vector
    rank: Vector
    prefix: int | None  # the strand, where the whole axis is one strand in order and once


class ChannelGraph:
    """The solved channel-dependency graph of a model.

    Attributes:
        shapes: shape by tensor name (parameters, buffers and plain float tensors).
        parameters: names of the parameters among them.
        tied: for every further name of a tied tensor, the name that it has in `shapes`.
        strands, group_sizes: the free channels; a group's size is the number of steps of its width.
        names: one name for each group, the module that produces its channels first.
        fixed: reason by place, for every axis of which no channel can be removed.
        torn: attributes that give the size of channels at one place and a fixed size at another.
        floor: the narrowest width that the proof could run; 1 for nearly every model.
    """

    def __init__(
        self,
        flow: Flow,
        tensors: Mapping[str, Sequence[Any]],
        shapes: Mapping[str, tuple[int, ...]],
        parameters: Sequence[str],
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self.parameters = tuple(parameters)
        self.tied = dict(tied or {})
        self._flow = flow
        self.floor = 1
        self.torn: set[str] = set()
        self._vectors: dict[Place, Vector] = {
            (name, axis): label
            for name, labels in tensors.items()
            for axis, label in enumerate(labels)
            if label is not None
        }
        self._solve()

    # -- solving ------------------------------------------------------------------------------------------------

    def _solve(self) -> None:
        # what `described` has found: every new subnet asks for it
        self._known: dict[int, tuple[Sequence[AttributeUse], int, dict[str, Scaled]]] = {}
        roots = self._flow.atoms.roots()
        self._units, self._unit_of = np.unique(roots, return_inverse=True)  # unit by atom
        constraints = self._flow.constraints
        frozen: NDArray[np.bool_] = np.zeros(len(self._units), bool)
        self._reason: dict[int, str] = {}
        for vector, reason in constraints.frozen:
            units = np.unique(self._unit_of[vector])
            for unit in units[~frozen[units]]:
                self._reason[int(unit)] = reason
            frozen[units] = True
        self._hold_kernels(frozen)
        ties = [
            tuple(self._unit_of[v] for v in tie) for tie in [*constraints.proportional, *self._attribute_ties(frozen)]
        ]
        placed = self._placed()
        while True:
            self._spread(frozen, ties)
            stuck = self._classify(frozen, ties, placed)
            if not len(stuck):
                break
            self._freeze_units(frozen, stuck, "its number of channels cannot change in step with what it is tied to")
        self._describe(frozen)

    def _freeze_units(self, frozen: NDArray[np.bool_], units: Vector, reason: str) -> None:
        for unit in units[~frozen[units]]:
            self._reason[int(unit)] = reason
        frozen[units] = True

    def _hold_kernels(self, frozen: NDArray[np.bool_]) -> None:
        """The atoms of a weight that is laid out as a kernel are no channels of their own: its parts are."""
        self._kernels = []
        alone = np.bincount(self._unit_of, minlength=len(self._units)) == 1
        for kernel in self._flow.kernels.values():
            units = self._unit_of[kernel.vector]
            parts = [v for v in kernel.parts if v is not None]
            if frozen[units].any() or not alone[units].all():
                for part in parts:
                    self._freeze_units(frozen, self._unit_of[part], "a flat kernel that is also used otherwise")
            else:
                self._kernels.append(kernel)
            self._freeze_units(frozen, units, "a flat kernel")

    def _attribute_ties(self, frozen: NDArray[np.bool_]) -> list[tuple[Vector, ...]]:
        """All sizes that one attribute gives must change in proportion; with a fixed one among them, none can."""
        uses: dict[str, list[AttributeUse]] = defaultdict(list)
        for use in self._flow.constraints.attributes:
            uses[use.path].append(use)
        ties = []
        for path, found in uses.items():
            vectors = [u.vector for u in found if u.vector is not None]
            if len(vectors) < len(found):
                self.torn |= {path} if vectors else set()
                for vector in vectors:
                    self._freeze_units(frozen, self._unit_of[vector], f"the attribute {path} also gives a fixed size")
            elif len(vectors) > 1:
                ties.append(tuple(vectors))
        return ties

    def _placed(self) -> NDArray[np.bool_]:
        """Units that occur in a tensor of the model; the others only tie some of them together."""
        placed = np.zeros(len(self._units), bool)
        for vector in self._vectors.values():
            placed[self._unit_of[vector]] = True
        return placed

    def _spread(self, frozen: NDArray[np.bool_], ties: Sequence[tuple[Vector, ...]]) -> None:
        """Where one side of a count tie holds fixed channels, no side can change."""
        changed = True
        while changed:
            changed = False
            for tie in ties:
                held = [frozen[v] for v in tie]
                if not any(h.any() for h in held) or all(h.all() for h in held):
                    continue
                first = np.sort(tie[0])
                if all(np.array_equal(first, np.sort(v)) for v in tie[1:]):
                    continue  # the same channels on both sides: their counts agree by themselves
                reason = next(self._reason[int(u)] for v in tie for u in v if frozen[u])
                for v in tie:
                    self._freeze_units(frozen, v, f"tied by count to fixed channels ({reason})")
                changed = True

    def _classify(
        self, frozen: NDArray[np.bool_], ties: Sequence[tuple[Vector, ...]], placed: NDArray[np.bool_]
    ) -> Vector:
        """Form strands (equal signature) and groups (tied by count); return the units that turn out stuck."""
        rng = np.random.default_rng(0)
        signature = np.zeros(len(self._units), np.uint64)
        live_ties = [tie for tie in ties if not frozen[tie[0]].any()]
        marks = [*self._vectors.values(), *(v for c in self._flow.contractions for v in c.vectors)]
        marks += [use.vector for use in self._flow.constraints.attributes if use.vector is not None]
        for units in [*(self._unit_of[v] for v in marks), *(v for tie in live_ties for v in tie)]:
            np.add.at(signature, units, rng.integers(1, 2**63, dtype=np.uint64))
        free = np.flatnonzero(~frozen)
        _, inverse = np.unique(signature[free], return_inverse=True)
        strand_of = np.full(len(self._units), -1, np.int64)
        strand_of[free] = inverse
        sizes = np.bincount(inverse, minlength=0)
        parent = list(range(len(sizes)))

        def find(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for tie in live_ties:
            counts = [np.bincount(strand_of[v], minlength=len(sizes)) for v in tie]
            if all(np.array_equal(counts[0], c) for c in counts[1:]):
                continue
            touched = np.flatnonzero(sum(counts))
            for other in touched[1:]:
                parent[find(int(other))] = find(int(touched[0]))
        members: dict[int, list[int]] = defaultdict(list)
        for strand in range(len(sizes)):
            members[find(strand)].append(strand)
        steps = {root: gcd(*(int(sizes[s]) for s in strands)) for root, strands in members.items()}
        real = np.bincount(strand_of[free], placed[free], minlength=len(sizes)) > 0
        stuck = [s for root, strands in members.items() if steps[root] < 2 or not real[strands].any() for s in strands]
        self._strand_of, self._strand_sizes = strand_of, sizes
        self._members, self._steps = members, steps
        return np.flatnonzero(np.isin(strand_of, stuck))

    def _describe(self, frozen: NDArray[np.bool_]) -> None:
        """Name the groups in the order of execution, and lay out ranks, strands and fixed places."""
        rank_of = np.full(len(self._units), -1, np.int64)
        for strand in range(len(self._strand_sizes)):
            units = np.flatnonzero(self._strand_of == strand)  # in order of their smallest atom
            rank_of[units] = np.arange(len(units))
        made_by: dict[int, list[str]] = defaultdict(list)
        for path, vector in self._flow.constraints.producers:
            for strand in np.unique(self._strand_of[self._unit_of[vector]]):
                if strand >= 0 and path not in made_by[int(strand)]:
                    made_by[int(strand)].append(path)
        first = {path: i for i, (path, _) in reversed(list(enumerate(self._flow.constraints.producers)))}
        last = len(first) + len(self._flow.constraints.producers)

        def start(root: int) -> tuple[int, int]:
            return min((first.get((made_by[s] or [""])[0], last), s) for s in self._members[root])

        ordered_units = np.zeros(len(self._units), bool)
        for vector in self._flow.constraints.ordered:
            ordered_units[self._unit_of[vector]] = True
        order = sorted(self._members, key=start)
        strands: dict[int, Strand] = {}
        self.names: list[str] = []
        for group, root in enumerate(order):
            self.names.append(self._name(root, made_by, first))
            for s in self._members[root]:
                size = int(self._strand_sizes[s])
                is_ordered = bool(ordered_units[self._strand_of == s].any())
                strands[s] = Strand(size, group, size // self._steps[root], is_ordered, tuple(made_by[s]))
        self.strands = [strands[s] for s in range(len(self._strand_sizes))]
        self.group_sizes = [self._steps[root] for root in order]
        self._atom_strand = self._strand_of[self._unit_of]
        self._atom_rank = rank_of[self._unit_of]
        self.places = {place: self._place(vector) for place, vector in self._vectors.items()}
        laid_out = {id(kernel.vector) for kernel in self._kernels}
        self.fixed = {
            place: self._reason.get(int(self._unit_of[vector[0]]), "not used in forward")
            for place, vector in self._vectors.items()
            if (self._atom_strand[vector] < 0).all() and id(vector) not in laid_out
        }
        held = {name for name, _ in self._vectors}
        self.fixed |= {(name, 0): "none of its axes carries channels" for name in self.parameters if name not in held}

    def _name(self, root: int, made_by: Mapping[int, list[str]], first: Mapping[str, int]) -> str:
        """Name a group after the module that produces its channels first and names no other group."""
        paths = sorted({path for s in self._members[root] for path in made_by[s]}, key=lambda path: first[path])
        if not paths:
            holders = [
                n
                for (n, _), v in self._vectors.items()
                if np.isin(self._strand_of[self._unit_of[v]], self._members[root]).any()
            ]
            paths = [holders[0]]
        for path in paths:
            if path not in self.names:
                return path
        return next(f"{paths[0]}:{i}" for i in range(2, len(self.names) + 3) if f"{paths[0]}:{i}" not in self.names)

    def _place(self, vector: Vector) -> Place_:
        strand, rank = self._atom_strand[vector], self._atom_rank[vector]
        whole = strand[0] >= 0 and (strand == strand[0]).all() and np.array_equal(rank, np.arange(len(rank)))
        return Place_(strand, rank, int(strand[0]) if whole else None)

    def freeze_tensors(self, names: Sequence[str], reason: str) -> None:
        """Keep all channels of these tensors, and solve again."""
        self.freeze(
            [self._vectors.get((name, axis)) for name in names for axis in range(len(self.shapes[name]))], reason
        )

    def reason(self, path: str) -> str:
        """Say why the channels that a module produces are fixed."""
        return self.held(next(v for p, v in self._flow.constraints.producers if p == path)) or "it is not fixed"

    def held(self, vector: Vector) -> str | None:
        """Say why channels of `vector` are fixed, or None if none is."""
        fixed = self._unit_of[vector[self._atom_strand[vector] < 0]]
        return self._reason.get(int(fixed[0]), "not used in forward") if len(fixed) else None

    def freeze(self, vectors: Sequence[Vector | None], reason: str) -> None:
        """Keep more channels than so far, and solve again."""
        for vector in vectors:
            self._flow.constraints.freeze(vector, reason)
        for name in ("products", "lengths", "producers", "attributes"):
            self.__dict__.pop(name, None)
        self._solve()

    def macs(self, widths: Sequence[int]) -> float:
        """Return the MACs of one image at these widths."""
        return sum(p.constant * prod(c(widths) for c in p.counts) for p in self.products)

    def half(self) -> float:
        """Return the share of the MACs that half of every width leaves, without rounding."""
        whole = self.group_sizes
        left = sum(p.constant * prod((c.fixed + c(whole)) / 2 for c in p.counts) for p in self.products)
        return left / max(1, self.macs(whole))

    @property
    def floors(self) -> list[int]:
        """The narrowest width of every group."""
        return [min(self.floor, max(1, n // 2)) for n in self.group_sizes]

    # -- reading ------------------------------------------------------------------------------------------------

    def count(self, vector: Vector) -> Count:
        """Return the active length of `vector` as a function of the widths."""
        strands = self._atom_strand[vector]
        terms: dict[int, int] = defaultdict(int)
        for strand, times in zip(*np.unique(strands[strands >= 0], return_counts=True), strict=True):
            info = self.strands[int(strand)]
            terms[info.group] += int(times) // info.size * info.ratio
        return Count(int((strands < 0).sum()), tuple(sorted(terms.items())))

    def active(self, widths: Sequence[int]) -> NDArray[np.bool_]:
        """Return for every atom whether it is active at these widths."""
        limits = np.array([s.ratio * widths[s.group] for s in self.strands] + [0], np.int64)  # strand -1 is fixed
        active = (self._atom_strand < 0) | (self._atom_rank < limits[self._atom_strand])
        for kernel in self._kernels:
            inside: NDArray[np.bool_] = np.ones(kernel.shape, bool)
            for axis, part in enumerate(kernel.parts):
                if part is not None:
                    inside &= active[part].reshape([-1 if i == axis else 1 for i in range(len(kernel.shape))])
            active[kernel.vector] = inside.ravel()
        return active

    def _area(self, kernel: Kernel) -> Area:
        fixed = prod(n for n, part in zip(kernel.shape, kernel.parts, strict=True) if part is None)
        return Area(fixed, tuple(self.count(part) for part in kernel.parts if part is not None))

    def _product(self, contraction: Contraction) -> Product:
        by_first = {int(kernel.vector[0]): kernel for kernel in self._kernels}
        constant, counts, held = contraction.constant, [], []
        for vector in contraction.vectors:
            kernel = by_first.get(int(vector[0]))
            parts = [vector] if kernel is None else [v for v in kernel.parts if v is not None]
            constant *= 1 if kernel is None else self._area(kernel).constant
            counts += [self.count(part) for part in parts]
            held += [reason for part in parts if (reason := self.held(part))]
        return Product(contraction.path, constant, tuple(counts), held[-1] if held else None)

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """MACs of one image as a function of the widths."""
        return tuple(map(self._product, self._flow.contractions))

    @cached_property
    def lengths(self) -> dict[Place, Count | Area]:
        """The active length of every axis that can shrink."""
        kernels = {int(kernel.vector[0]): kernel for kernel in self._kernels}
        found: dict[Place, Count | Area] = {}
        for place, vector in self._vectors.items():
            if int(vector[0]) in kernels:
                found[place] = self._area(kernels[int(vector[0])])
            elif (self._atom_strand[vector] >= 0).any():
                found[place] = self.count(vector)
        return found

    @cached_property
    def producers(self) -> dict[str, Count]:
        """The number of channels that each module produces."""
        found: dict[str, Count] = {}
        for path, vector in self._flow.constraints.producers:
            found.setdefault(path, self.count(vector))
        return found

    @cached_property
    def attributes(self) -> dict[str, Scaled]:
        """Attributes that change with the widths because the forward takes sizes from them."""
        return self.described(self._flow.constraints.attributes)

    def described(self, uses: Sequence[AttributeUse]) -> dict[str, Scaled]:
        """Return those of `uses` that change with the widths, by path; the first use of a path counts."""
        found: dict[str, Scaled] = {}
        known = self._known.get(id(uses))
        if known is not None and known[0] is uses and known[1] == len(uses):
            return known[2]
        for use in uses:
            if use.vector is not None and (self._atom_strand[use.vector] >= 0).any():
                found.setdefault(use.path, Scaled(use.value, len(use.vector), self.count(use.vector), use.power))
        self._known[id(uses)] = uses, len(uses), found
        return found

    def slices(self, widths: Sequence[int], described: Sequence[AttributeUse] = ()) -> Slices:
        """Return what every tensor keeps and every attribute is at these widths; `described` are set as well."""
        active = None
        tensors: dict[str, tuple[Axis, ...]] = {}
        for (name, axis), length in self.lengths.items():
            place = self.places[name, axis]
            runs: Axis
            if place.prefix is not None:
                strand = self.strands[place.prefix]
                runs = ((0, strand.ratio * widths[strand.group]),)
                if runs[0][1] == self.shapes[name][axis]:
                    continue
            else:
                if length(widths) == self.shapes[name][axis]:
                    continue
                if active is None:
                    active = self.active(widths)
                runs = _runs(active[self._vectors[name, axis]])
            axes = list(tensors.get(name, (None,) * len(self.shapes[name])))
            axes[axis] = runs
            tensors[name] = tuple(axes)
        tensors |= {name: tensors[first] for name, first in self.tied.items() if first in tensors}
        attributes: dict[str, Value] = {}
        for path, scaled in {**self.described(described), **self.attributes}.items():
            new = scaled(widths)
            if new != scaled.value:
                attributes[path] = new
        return Slices(tensors, attributes)


def _runs(keep: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    return tuple((int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True))
