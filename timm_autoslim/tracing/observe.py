"""What a trace observed of a model, as a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.formulas import Place
from timm_autoslim.tracing.labels import AttributeUse, Contraction, Kernel, Label, Vector


@dataclass(frozen=True)
class Observations:
    """What a trace observed of a model, as a value.

    Attributes:
        roots: for every atom the representative of its unit.
        frozen_vectors: (vector, reason): no channel of the vector can be removed.
        count_ties: vectors whose active counts keep the proportion of their lengths.
        ordered_vectors: vectors whose channels are matched by position, so that they keep their order.
        attributes: attributes that the forward takes sizes from.
        descriptions: attributes that only describe a module; users and timm read them.
        producers: (module path, vector): the module produces these channels, in the order of execution.
        contractions: the matrix products and convolutions.
        kernels: columns of weight matrices that are laid out as kernels.
        vectors: the atoms of every axis that carries channels.
        shapes: shape by name of every parameter, buffer and tensor attribute.
        parameters: names of the parameters among them.
        tied_names: for every further name of a tied tensor, the name that it has in `shapes`.
        dropped: names of the parameters that the forward computes with, and that no output depends on.
    """

    roots: Vector
    frozen_vectors: tuple[tuple[Vector, str], ...]
    count_ties: tuple[tuple[Vector, ...], ...]
    ordered_vectors: tuple[Vector, ...]
    attributes: tuple[AttributeUse, ...]
    descriptions: tuple[AttributeUse, ...]
    producers: tuple[tuple[str, Vector], ...]
    contractions: tuple[Contraction, ...]
    kernels: tuple[Kernel, ...]
    vectors: Mapping[Place, Vector]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    tied_names: Mapping[str, str]
    dropped: tuple[str, ...] = ()


def observe(
    flow: Flow,
    labels: Mapping[str, Sequence[Label]],
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Sequence[str],
    descriptions: Sequence[AttributeUse] = (),
    tied_names: Mapping[str, str] | None = None,
) -> Observations:
    """Return the observations of a trace so far.

    Args:
        flow: the trace.
        labels: by tensor name, one label for each axis.
        shapes, parameters, descriptions, tied_names: as in `Observations`.
    """
    constraints = flow.constraints
    return Observations(
        roots=flow.atoms.find_all(),
        frozen_vectors=tuple(constraints.frozen_vectors),
        count_ties=tuple(constraints.count_ties),
        ordered_vectors=tuple(constraints.ordered_vectors),
        attributes=tuple(constraints.attributes),
        descriptions=tuple(descriptions),
        producers=tuple(constraints.producers),
        contractions=tuple(flow.contractions),
        kernels=tuple(flow.kernels.values()),
        vectors={(name, axis): v for name, axes in labels.items() for axis, v in enumerate(axes) if v is not None},
        shapes=dict(shapes),
        parameters=tuple(parameters),
        tied_names=dict(tied_names or {}),
    )
