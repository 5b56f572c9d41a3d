"""Sort the units of every strand by importance: narrow subnets keep the first units, which are then the best ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn

from timm_autoslim.errors import WidthError
from timm_autoslim.slicing.slices import clear_caches
from timm_autoslim.supernet.selection import READS, SelectionImportance, collect_moments
from timm_autoslim.tracing.graph import AxisUnits, ChannelGraph
from timm_autoslim.utils.arguments import check_flag, check_module, check_type, quote
from timm_autoslim.utils.copying import copy_deeply
from timm_autoslim.utils.processes import choose_pool, copy_from_first
from timm_autoslim.utils.tables import Table
from timm_autoslim.utils.tensors import named_tensors

M = TypeVar("M", bound=nn.Module)

# Takes a `tp.Group`, and returns one score for each unit of it; None if it says nothing of these layers.
Scorer = Callable[[Any], Tensor | None]

CRITERIA: Table[Callable[..., Scorer]] = Table("criterion")
"""Criteria of importance by name, all but the last from torch-pruning; called without arguments, each returns a scorer.

A unit's score is the mean over all layers that it runs through.

- "l1", "l2": the magnitude of the weights.
- "bn_scale": the magnitude of BatchNorm's scale.
- "fpgm": the distance from the geometric median of the filters; what grouped convolutions read does not count.
- "lamp": the magnitude, relative to the larger ones of the layer.
- "taylor": weight times gradient; it reads the gradients in the model.
- "random": random numbers.
- "reconstruction": how well the outputs of the next layers can be computed from the units ranked before, on images; see
  `SelectionImportance`. This one is called with the moments of the layers' inputs.
"""
CRITERIA.add("l1")(functools.partial(tp.importance.GroupMagnitudeImportance, p=1))
CRITERIA.add("l2")(functools.partial(tp.importance.GroupMagnitudeImportance, p=2))
CRITERIA.add("bn_scale")(tp.importance.BNScaleImportance)


class _FilterDistance(tp.importance.FPGMImportance):  # type: ignore[misc]
    """FPGM, which torch-pruning 1.6 cannot compute of what a grouped convolution reads: such places are left out."""

    def __call__(self, group: Any, **options: Any) -> Tensor | None:
        """Return one score for each unit of a group; None if no other layer is left."""
        ungrouped = tp.dependency.Group()
        for dependency, channels, root_idxs in ((*item, item.root_idxs) for item in group):
            if dependency.pruning_fn is tp.prune_conv_in_channels and dependency.layer.groups > 1:
                continue
            ungrouped.add_dep(dependency, channels)
            ungrouped[len(ungrouped) - 1].root_idxs = root_idxs
        return super().__call__(ungrouped, **options)  # type: ignore[no-any-return]


CRITERIA.add("fpgm")(_FilterDistance)
CRITERIA.add("lamp")(tp.importance.LAMPImportance)
CRITERIA.add("taylor")(tp.importance.GroupTaylorImportance)
CRITERIA.add("random")(tp.importance.RandomImportance)
CRITERIA.add("reconstruction")(SelectionImportance)


def _get_pruning_function(module: nn.Module, axis: int) -> Any:
    """Return torch-pruning's function that removes channels along this axis of the module's weight, or None."""
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

    The root index of a channel is its unit's rank, so that torch-pruning returns one score for each unit.
    """
    group = tp.dependency.Group()
    first: Any = None
    for (name, axis), units in graph.places.items():
        path, _, leaf = name.rpartition(".")
        channels = np.flatnonzero(units.strand == strand)
        if leaf != "weight" or not len(channels):
            continue
        module = model.get_submodule(path)
        function = _get_pruning_function(module, axis)
        if function is None:
            continue
        node = tp.dependency.Node(module, None, path)
        first = first or (node, function)
        dependency = tp.dependency.Dependency(first[1], function, first[0], node)
        group.add_dep(dependency, channels.tolist())
        group[len(group) - 1].root_idxs = units.rank[channels].tolist()
    return group if first else None


# Torch-pruning's functions that remove what a layer puts out; all others remove what it reads.
_OUTPUTS = (
    tp.prune_conv_out_channels,
    tp.prune_linear_out_channels,
    tp.prune_batchnorm_out_channels,
    tp.prune_layernorm_out_channels,
)


def describe_structures(model: nn.Module, graph: ChannelGraph) -> list[tuple[str, ...]]:
    """Return by strand which types of layers put its channels out, and which read them, in their order in the model.

    Strands with equal descriptions are isomorphic (Fang et al., "Isomorphic Pruning for Vision Models", arXiv
    2407.04616, compare sub-structures so, by types of layers alone).
    """
    groups = [make_pruning_group(model, graph, index) for index in range(len(graph.strands))]
    return [
        tuple(
            f"{type(dependency.target.module).__name__} {'out' if dependency.handler in _OUTPUTS else 'in'}"
            for dependency, _ in group or ()
        )
        for group in groups
    ]


def score_units(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str,
    seed: int = 0,
    batches: Iterable[Any] | None = None,
    distributed: bool = False,
) -> list[NDArray[np.float64] | None]:
    """Return the scores of the units of every strand, by rank; None for a strand that the criterion cannot score.

    Args:
        model: the model of the graph.
        graph: its channel graph.
        criterion: a name in `CRITERIA`.
        seed: of the criterion "random"; torch's global generator is left as it was.
        batches: inputs on the model's device, which the criterion "reconstruction" reads.
        distributed: whether each process has batches of its own.

    Raises:
        ConfigError: the criterion is unknown.
        WidthError: the criterion is "taylor", and a weight that it reads has no gradient; or it is "reconstruction",
            and there are no batches.
        DataError: a batch is none of the model's inputs, or is not finite.
    """
    make_scorer = CRITERIA.pick(criterion)
    groups = [make_pruning_group(model, graph, index) for index in range(len(graph.strands))]
    if criterion == "taylor":
        _check_gradients(group for group in groups if group is not None)
    pool = choose_pool(distributed)
    data = [collect_moments(model, _require_batches(batches), pool)] if criterion == "reconstruction" else []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        scorer = make_scorer(*data)
        scores = [None if group is None else scorer(group) for group in groups]
        if data:
            copy_from_first(pool, [tensor for tensor in scores if tensor is not None])
    return [
        None if tensor is None else tensor[: strand.size].double().cpu().numpy()
        for strand, tensor in zip(graph.strands, scores, strict=True)
    ]


def _require_batches(batches: Iterable[Any] | None) -> Iterable[Any]:
    if batches is None:
        needed = 'images (N, C, H, W) in batches, which the criterion "reconstruction" reads'
        remedy = "pass batches=images.split(100), of 500 images or more, or choose another criterion"
        raise WidthError.at("batches", got="None", needed=needed, remedy=remedy)
    return batches


def _check_gradients(groups: Iterable[Any]) -> None:
    """Raise WidthError if a weight that "taylor" reads has no gradient."""
    # it reads nothing of BatchNorms, and no bias of layers that have the channels as inputs
    leaves = {tp.prune_batchnorm_out_channels: (), **dict.fromkeys(READS, ("weight",))}
    for dependency in (dependency for group in groups for dependency, _ in group):
        for leaf in leaves.get(dependency.handler, ("weight", "bias")):
            tensor = getattr(dependency.target.module, leaf, None)
            if tensor is not None and (not tensor.is_leaf or tensor.grad is None):
                path = dependency.target.name.partition(" ")[0]
                raise WidthError.at(
                    f"{path}.{leaf}",
                    got="no gradient",
                    needed='a gradient, which the criterion "taylor" reads',
                    remedy="run the loss backward through the widest subnet on some batches first, with "
                    "requires_grad=True for every weight: a frozen one gets no gradient",
                )


def _permute_axis(units: AxisUnits, orders: dict[int, NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the index that moves the channels of one axis into the new order of their strands."""
    index = np.arange(len(units.strand))
    for strand, order in orders.items():
        channels = np.flatnonzero(units.strand == strand)
        if len(channels):
            # (units, occurrences): a unit may have several channels on this axis
            grid = channels[np.argsort(units.rank[channels], kind="stable")].reshape(len(order), -1)
            index[grid.ravel()] = grid[order].ravel()
    return index


def permute_units(model: M, graph: ChannelGraph, orders: dict[int, NDArray[np.int64]]) -> M:
    """Return a copy of `model` with the units of strands in a new order; it computes the same function.

    Args:
        model: the model of the graph.
        graph: its channel graph.
        orders: by the index of a strand, the ranks of its units in the new order.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert, permute_units
        >>> model = timm.create_model("resnet10t", num_classes=10).eval()
        >>> images = torch.randn(2, 3, 32, 32)
        >>> graph = convert(model, images).graph
        >>> swapped = permute_units(model, graph, {0: np.array([1, 0, *range(2, graph.strands[0].size)])})
        >>> torch.allclose(swapped(images), model(images), atol=1e-4)
        True
    """
    memo: dict[int, object] = {}
    changed = False
    for name, tensor in named_tensors(model).items():
        permuted = tensor.detach()
        for axis in range(tensor.dim()):
            units = graph.places.get((name, axis))
            index = None if units is None else _permute_axis(units, orders)
            if index is not None and not np.array_equal(index, np.arange(len(index))):
                permuted = permuted.index_select(axis, torch.from_numpy(index).to(permuted.device))
                changed = True
        permuted = torch.empty_like(tensor).copy_(permuted)  # in the same memory layout
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(permuted, tensor.requires_grad) if is_parameter else permuted
    result = copy_deeply(model, memo)
    if changed:
        clear_caches(result.modules())
    return result


def reorder_channels(
    model: M,
    graph: ChannelGraph,
    order: str,
    batches: Iterable[Any] | None = None,
    *,
    distributed: bool = False,
) -> M:
    """Return a copy of `model` with the channels of every strand sorted by importance, the best first.

    The copy computes the same function up to float rounding. Channels that a shuffle matches by position stay in their
    order. The same model and criterion give the same copy, "random" included.

    Args:
        model: the model of the graph.
        graph: its channel graph.
        order: a name in `CRITERIA`; "taylor" needs gradients, so run the loss backward on some batches first.
        batches: inputs on the model's device, without labels, for "reconstruction"; 500 images or more are good.
        distributed: the processes of torch.distributed work together, each with batches of its own, and end with the
            same order; every process needs batches. Otherwise each works alone, and should get the same batches.

    Raises:
        WidthError: an argument is of the wrong type, the order is unknown, or it is "taylor" and a weight that it reads
            has no gradient, or "reconstruction" and there are no batches.
        DataError: a batch is none of the model's inputs, or is not finite.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert, reorder_channels
        >>> model = timm.create_model("resnet10t", num_classes=10).eval()
        >>> images = torch.randn(2, 3, 32, 32)
        >>> reordered = reorder_channels(model, convert(model, images).graph, "l1")
        >>> torch.allclose(reordered(images), model(images), atol=1e-4)
        True
    """
    check_module("model", model, WidthError)
    check_type("graph", graph, ChannelGraph, WidthError, "the model's ChannelGraph, supernet.graph")
    if not isinstance(order, str) or order not in CRITERIA:
        raise WidthError.at("order", got=quote(order), needed=f"None or one of {list(CRITERIA)}")
    check_flag("distributed", distributed, WidthError)
    units = score_units(model, graph, order, batches=batches, distributed=distributed)
    scores = zip(graph.strands, units, strict=True)
    orders = {
        i: np.argsort(-s, kind="stable") for i, (strand, s) in enumerate(scores) if s is not None and not strand.ordered
    }
    return permute_units(model, graph, orders)
