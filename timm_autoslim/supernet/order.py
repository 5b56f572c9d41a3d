"""Order the channels of every strand by importance, so that the first ones, which every subnet keeps, are the best."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import nn

from timm_autoslim.errors import WidthError
from timm_autoslim.slicing.slices import clear_caches
from timm_autoslim.tracing.graph import AxisUnits, ChannelGraph
from timm_autoslim.utils.tensors import named_tensors

M = TypeVar("M", bound=nn.Module)

# torch-pruning's criteria by name; "mean" adds the scores of all layers that a channel runs through.
CRITERIA: dict[str, Callable[[], Any]] = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn_scale": tp.importance.BNScaleImportance,
    "fpgm": tp.importance.FPGMImportance,
    "lamp": tp.importance.LAMPImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "random": tp.importance.RandomImportance,
}


def _pruning_function(module: nn.Module, axis: int) -> Any:
    """Return torch-pruning's name for removing channels along this axis of the module's weight, or None."""
    if isinstance(module, nn.modules.conv._ConvNd):
        out_axis = 1 if module.transposed else 0
        return {out_axis: tp.prune_conv_out_channels, 1 - out_axis: tp.prune_conv_in_channels}.get(axis)
    if isinstance(module, nn.Linear):
        return (tp.prune_linear_out_channels, tp.prune_linear_in_channels)[axis]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return tp.prune_batchnorm_out_channels
    if isinstance(module, nn.LayerNorm):
        return tp.prune_layernorm_out_channels
    return None


def make_pruning_group(model: nn.Module, graph: ChannelGraph, strand: int) -> Any | None:
    """Return the `tp.Group` of the layers that hold the channels of one strand; None if torch-pruning knows none.

    The root index of a channel is its unit's rank, so torch-pruning's scores come out one for each unit.
    """
    group = tp.dependency.Group()
    first: Any = None
    for (name, axis), place in graph.places.items():
        path, _, leaf = name.rpartition(".")
        here = np.flatnonzero(place.strand == strand)
        if leaf != "weight" or not len(here):
            continue
        module = model.get_submodule(path)
        function = _pruning_function(module, axis)
        if function is None:
            continue
        node = tp.dependency.Node(module, None, path)
        first = first or (node, function)
        dependency = tp.dependency.Dependency(first[1], function, first[0], node)
        group.add_dep(dependency, here.tolist())
        group[len(group) - 1].root_idxs = place.rank[here].tolist()
    return group if first else None


def score_units(
    model: nn.Module, graph: ChannelGraph, criterion: str, seed: int = 0
) -> list[NDArray[np.float64] | None]:
    """Return the scores of the units of every strand, by rank; None for a strand of which the criterion says nothing.

    Args:
        model: the traced model.
        graph: its channel graph.
        criterion: a name in `CRITERIA`.
        seed: of the criterion "random"; torch's global generator is left as it was.

    Raises:
        WidthError: the criterion is "taylor", and a weight that it reads has no gradient.
    """
    groups = [make_pruning_group(model, graph, index) for index in range(len(graph.strands))]
    if criterion == "taylor":
        _check_gradients(group for group in groups if group is not None)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        scorer = CRITERIA[criterion]()
        scores = [None if group is None else scorer(group) for group in groups]
    return [
        None if found is None else found[: strand.size].double().cpu().numpy()
        for strand, found in zip(graph.strands, scores, strict=True)
    ]


_INPUTS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


def _check_gradients(groups: Iterable[Any]) -> None:
    """Raise WidthError if a weight that "taylor" reads has no gradient."""
    # it reads nothing of BatchNorms, and of layers that take the channels in no bias
    read = {tp.prune_batchnorm_out_channels: (), **dict.fromkeys(_INPUTS, ("weight",))}
    for dependency in (dependency for group in groups for dependency, _ in group):
        for leaf in read.get(dependency.handler, ("weight", "bias")):
            tensor = getattr(dependency.target.module, leaf, None)
            if tensor is not None and (not tensor.is_leaf or tensor.grad is None):
                path = dependency.target.name.partition(" ")[0]
                raise WidthError(
                    f'{path}.{leaf}: the criterion "taylor" got no gradient here; run the loss backward through '
                    "the widest subnet on some batches first, with requires_grad=True for every weight: a frozen one "
                    "gets none"
                )


def _permuted(place: AxisUnits, orders: dict[int, NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the index that moves the channels of one axis into their strands' new order."""
    index = np.arange(len(place.strand))
    for strand, order in orders.items():
        here = np.flatnonzero(place.strand == strand)
        if len(here):
            grid = here[np.argsort(place.rank[here], kind="stable")].reshape(len(order), -1)  # unit x occurrence
            index[grid.ravel()] = grid[order].ravel()
    return index


def permute_units(model: M, graph: ChannelGraph, orders: dict[int, NDArray[np.int64]]) -> M:
    """Return a copy of `model` with the units of each strand in a new order (best first); its function is the same."""
    memo: dict[int, object] = {}
    changed = []
    for name, tensor in named_tensors(model).items():
        moved = tensor.detach()
        for axis in range(tensor.dim()):
            place = graph.places.get((name, axis))
            index = None if place is None else _permuted(place, orders)
            if index is not None and not np.array_equal(index, np.arange(len(index))):
                moved = moved.index_select(axis, torch.from_numpy(index).to(moved.device))
                changed.append(name)
        moved = moved.clone()
        memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    plain = copy.deepcopy(model, memo)
    clear_caches({plain.get_submodule(name.rpartition(".")[0]) for name in changed})
    return plain


def reorder_channels(model: M, graph: ChannelGraph, order: str) -> M:
    """Return a copy of `model` whose channels are sorted by importance, the best first, in every strand.

    The copy computes the same function to float rounding. Channels that a shuffle matches by position keep their order.
    The same model and order give the same copy, "random" included.

    Args:
        model: the traced model.
        graph: its channel graph.
        order: a name in `CRITERIA`; "taylor" needs gradients, so run backward on some batches first.

    Raises:
        WidthError: the order is unknown, or it is "taylor" and a weight that it reads has no gradient.
    """
    if order not in CRITERIA:
        raise WidthError(f"got order={order!r}; needed: None or one of {sorted(CRITERIA)}")
    scores = zip(graph.strands, score_units(model, graph, order), strict=True)
    orders = {
        i: np.argsort(-s, kind="stable") for i, (strand, s) in enumerate(scores) if s is not None and not strand.ordered
    }
    return permute_units(model, graph, orders)
