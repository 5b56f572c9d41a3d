"""What a forward of the widest has kept in the model for its next call, and what a narrower subnet cannot take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timm_autoslim.errors import ModelChangedError, quote_error
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.tracing.caches import AttributeName, Holdings, empty_attributes, find_caches, list_holdings, may_keep
from timm_autoslim.tracing.outer_state import with_empty_caches
from timm_autoslim.tracing.record import Recorder
from timm_autoslim.utils.meta import copy_to_meta


@dataclass(frozen=True)
class Leftovers:
    """Tensors that a forward has kept, and whose shapes follow the widths.

    Attributes:
        tensors: by path.
        places: the attributes that hold them; for each whether it is a container that is to be emptied.
    """

    tensors: Mapping[str, Tensor]
    places: Mapping[AttributeName, bool]

    def explain(self, error: RuntimeError) -> ModelChangedError:
        """Return the error to raise in place of one that a subnet raised because it met these."""
        places = ", ".join(
            f"supernet.model.{name} of the shape {tuple(tensor.shape)}" for name, tensor in self.tensors.items()
        )
        return ModelChangedError.at(
            "the subnet",
            got=f"what an earlier forward has kept at another width ({places}): {quote_error(error)}",
            needed="a model that holds nothing of another width",
            remedy="put it back to what the constructor sets, such as None, before another width runs",
        )

    def empty(self, extracted: nn.Module) -> None:
        """Put these attributes of a copy of the model back to what the constructor left."""
        empty_attributes(extracted, self.places)


def find_leftovers(model: nn.Module, slices: Slices, example: Any) -> Leftovers | None:
    """Return what the model has kept and a subnet would keep in another shape; None if there is nothing.

    Args:
        model: the model, which may have run.
        slices: those of the subnet.
        example: inputs of the forward on the meta device.
    """
    return with_empty_caches(model, lambda _: _find_leftovers(model, slices, example)) if may_keep(model) else None


def _find_leftovers(model: nn.Module, slices: Slices, example: Any) -> Leftovers | None:
    caches = find_caches(model, example)
    holdings = {place: value for place, value in list_holdings(model).items() if isinstance(value, Tensor)}
    holdings = {place: value for place, value in holdings.items() if _find_root(place) in caches}
    if not holdings:
        return None
    widest, subnet = (_run_empty(model, each, caches, example) for each in (Slices({}, {}), slices))
    stale = {
        place: value for place, value in holdings.items() if _read_shape(widest, place) != _read_shape(subnet, place)
    }
    tensors = {".".join(filter(None, place)): value for place, value in stale.items()}
    return Leftovers(tensors, {root: caches[root] for root in map(_find_root, stale)}) if stale else None


def _find_root(place: AttributeName) -> AttributeName:
    return place[0], place[1].partition("[")[0]


def _read_shape(holdings: Holdings, place: AttributeName) -> tuple[int, ...] | None:
    value = holdings.get(place)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _run_empty(model: nn.Module, slices: Slices, caches: Mapping[AttributeName, bool], example: Any) -> Holdings:
    """Return what a subnet keeps that starts without what the model has kept."""
    meta_copy = copy_to_meta(model)
    empty_attributes(meta_copy, caches)
    subnet = replicate(meta_copy, slices)
    Recorder(subnet).run(example)
    return list_holdings(subnet)
