"""Ways to make a slim model of a trained one: ours, and those of torch-pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from timm_autoslim import HeldOut, Supernet, baseline, convert, cost, permute_units, reconstruct, sandwich_step, search
from timm_autoslim.recipes.benchmarks.lib.fitting import Pictures, fit

Batches = list[tuple[Tensor, Tensor]]  # images (N, 3, H, W) and classes (N,)
History = list[tuple[str, bool, list[int]]]  # of torch-pruning: layer, whether of its outputs, channels removed

# Of torch-pruning: the steps to 95 % of all channels, after how many of them the gradients are collected again, and on
# how many images. Its authors' reproduce/main.py does that in every step for the criterion that reads images.
STEPS, EVERY, RENEWED = 300, 3, 200
# Images that the command `slim` orders channels and reconstructs with by default.
ORDERED, RECONSTRUCTED = 500, 5_000


@dataclass(frozen=True)
class Task:
    """What every way of slimming gets.

    Attributes:
        model: the trained model, which is cut; it is not changed.
        original: the same, or in stages what it was cut from; it teaches.
        gradients: training images that importance is measured on.
        held_out: training images that subnets are ranked on, in parts.
        batches: training images (N, 3, H, W) that networks between two searches are reconstructed on, and that a
            supernet is trained on.
        targets: their classes (M,), of all batches.
        shares: of the model's MACs, falling.
        seed: of what is drawn.
    """

    model: nn.Module
    original: nn.Module
    gradients: Batches
    held_out: Batches
    batches: list[Tensor]
    targets: Tensor
    shares: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class Network:
    """A slim model.

    Attributes:
        model: cut out, neither calibrated nor trained.
        supernet: what it was extracted from; None for those of torch-pruning, see `adopt`.
        unseen: MACs that finding it took in threads, where no counter sees them: the forwards of `reconstruct`.
        history: what torch-pruning removed.
    """

    model: nn.Module
    supernet: Supernet | None
    unseen: int = 0
    history: History = field(default_factory=list)


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Return the MACs of convolutions and linear layers for one image (1, 3, H, W)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return int(counter.get_total_flops()) // 2


def count_forwards(model: nn.Module, supernet: Supernet, batches: list[Tensor]) -> int:
    """Return the MACs of the forwards of both models that a reconstruction runs."""
    image = batches[0][:1]
    return sum(map(len, batches)) * (count_macs(model, image) + count_macs(supernet.model, image))


def collect_gradients(model: nn.Module, batches: Batches) -> None:
    """Add the gradients of the loss to the model's weights."""
    model.eval().zero_grad()
    for images, targets in batches:
        F.cross_entropy(model(images), targets).backward()  # type: ignore[no-untyped-call]


def score(subnet: Any, batch: tuple[Tensor, Tensor]) -> float:
    """Return the loss of a subnet on a batch of images and classes."""
    return F.cross_entropy(subnet(batch[0]), batch[1]).item()


def make_supernet(task: Task, order: str = "reconstruction") -> Supernet:
    """Return the supernet of the trained model, with channels in order of importance."""
    model = copy.deepcopy(task.model)
    if order == "taylor":
        collect_gradients(model, task.gradients)
    images = [images for images, _ in task.gradients]
    return convert(model, images[0][:2], order=order, batches=images).eval()


def search_widths(task: Task) -> Iterator[Network]:
    """Search on the trained model itself, and for the next share on the network found, reconstructed."""
    yield from _search_in_turn(task, 1.0)


def search_few_parameters(task: Task) -> Iterator[Network]:
    """The same with a limit of the parameters too, 0.6 of the share of the MACs: what torch-pruning leaves of lite0."""
    yield from _search_in_turn(task, 0.6)


def _search_in_turn(task: Task, parameters: float) -> Iterator[Network]:
    model, original_macs, unseen = task.model, count_macs(task.model, task.batches[0][:1]), 0
    count = sum(parameter.numel() for parameter in model.parameters())
    for share in task.shares:
        supernet = make_supernet(replace(task, model=model))
        budget = f"macs<={round(share * original_macs)}"
        if parameters < 1:
            budget += f" and params<={round(parameters * share * count)}"
        evaluate = HeldOut(task.held_out, score)
        result = search(supernet, [budget], evaluate, seed=task.seed, progress=False)
        widths = result.networks[0].widths
        yield Network(supernet.extract(widths), supernet, unseen)
        if share != task.shares[-1]:
            model = supernet.extract(widths).eval()
            reconstruct(model, supernet, task.batches, memory_mib=4096, progress=False)
            unseen = count_forwards(model, supernet, task.batches)


def search_by_outputs(task: Task) -> Iterator[Network]:
    """Search on the trained model itself, and rank by the distance to the original's outputs: no labels are read."""
    with torch.no_grad():
        held_out = [(images, task.original(images).softmax(1)) for images, _ in task.held_out]
    yield from search_widths(replace(task, held_out=held_out))


def slim_by_default(task: Task) -> Iterator[Network]:
    """The same as `python -m timm_autoslim slim` does it: with fewer images, and channels last."""
    images, batches = sum(len(images) for images, _ in task.gradients), sum(map(len, task.batches))
    few = replace(
        task,
        model=copy.deepcopy(task.model).to(memory_format=torch.channels_last),
        gradients=take_share(task.gradients, ORDERED / images),
        batches=take_share(task.batches, RECONSTRUCTED / batches),
    )
    yield from search_by_outputs(few)


def take_share(batches: list[Any], share: float) -> list[Any]:
    """Return the first batches, a share of all, and one at least."""
    return batches[: max(1, round(share * len(batches)))]


def search_at_once(task: Task) -> Iterator[Network]:
    """Search on the trained model itself, one descent through all shares."""
    supernet = make_supernet(task)
    evaluate = HeldOut(task.held_out, score)
    result = search(supernet, {"macs": _to_macs(supernet, task)}, evaluate, seed=task.seed, progress=False)
    for network in result.networks:
        yield Network(supernet.extract(network.widths), supernet)


def search_supernet(task: Task) -> Iterator[Network]:
    """Train a supernet for one epoch with the model as the teacher, then one descent through all shares."""
    supernet = make_supernet(task)
    train_supernet(supernet, task)
    evaluate = HeldOut(task.held_out, score)
    result = search(supernet, {"macs": _to_macs(supernet, task)}, evaluate, seed=task.seed, progress=False)
    for network in result.networks:
        yield Network(supernet.extract(network.widths), supernet)


def train_supernet(supernet: Supernet, task: Task) -> None:
    """Train the widest, the narrowest and two random subnets in each step."""
    draws = torch.Generator().manual_seed(task.seed)

    def measure(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []
        sandwich_step(
            model, supernet.space, images, targets, F.cross_entropy, generator=draws, teacher=task.original.eval(),
            teach_widest=0.5, backward=losses.append,
        )  # fmt: skip
        return torch.stack(losses).sum()

    pictures, optimizer = Pictures(torch.cat(task.batches), task.targets), torch.optim.AdamW
    fit(supernet, pictures, lambda x: x, measure, optimizer, epochs=1, batch=64, rate=1e-3, seed=task.seed)
    supernet.zero_grad()
    supernet.eval()


def take_uniform(task: Task) -> Iterator[Network]:
    """One multiplier for all widths."""
    yield from _run_baseline(task, "uniform", "reconstruction")


def rank_importance(task: Task) -> Iterator[Network]:
    """A global ranking of all channels by first-order importance, in our interface."""
    yield from _run_baseline(task, "importance", "taylor")


def rank_isomorphic(task: Task) -> Iterator[Network]:
    """First-order importance, ranked within groups of the same structure (arXiv 2407.04616), in our interface."""
    yield from _run_baseline(task, "isomorphic", "taylor")


def _run_baseline(task: Task, method: str, order: str) -> Iterator[Network]:
    supernet = make_supernet(task, order)
    collect_gradients(supernet.model, task.gradients)
    budgets = {"macs": _to_macs(supernet, task)}
    result = baseline(supernet, budgets, lambda subnet: 0.0, method, criterion="taylor", progress=False)
    for network in result.networks:
        yield Network(supernet.extract(network.widths), supernet)


def _to_macs(supernet: Supernet, task: Task) -> list[int]:
    return [round(share * cost(supernet).macs) for share in task.shares]


def prune_by_taylor(task: Task) -> Iterator[Network]:
    """Global first-order importance (Molchanov et al., arXiv 1906.10771) over the groups of DepGraph."""
    yield from _prune(task, tp.importance.GroupTaylorImportance())


def prune_once_by_taylor(task: Task) -> Iterator[Network]:
    """The same with gradients of the original alone."""
    yield from _prune(task, tp.importance.GroupTaylorImportance(), renewed=False)


def prune_by_magnitude(task: Task) -> Iterator[Network]:
    """Global group magnitude (DepGraph, arXiv 2301.12900)."""
    yield from _prune(task, tp.importance.GroupMagnitudeImportance(p=2), renewed=False)


def prune_isomorphic(task: Task) -> Iterator[Network]:
    """First-order importance, ranked within groups of the same structure (arXiv 2407.04616)."""
    yield from _prune(task, tp.importance.GroupTaylorImportance(), isomorphic=True)


def _prune(task: Task, importance: Any, renewed: bool = True, **options: Any) -> Iterator[Network]:
    image, model = task.gradients[0][0][:1], copy.deepcopy(task.model)
    collect_gradients(model, task.gradients)
    original_macs = count_macs(model, image)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model, image, importance=importance, global_pruning=True, pruning_ratio=0.95, iterative_steps=STEPS,
        ignored_layers=[head], **options,
    )  # fmt: skip
    images, targets = (torch.cat(parts) for parts in zip(*task.gradients, strict=True))
    parts = list(zip(torch.split(images, RENEWED), torch.split(targets, RENEWED), strict=True))
    for share in task.shares:
        while count_macs(model, image) > share * original_macs:
            if renewed and pruner.current_step and pruner.current_step % EVERY == 0:
                collect_gradients(model, [parts[pruner.current_step // EVERY % len(parts)]])
            pruner.step()
        network = copy.deepcopy(model)
        network.zero_grad()
        yield Network(
            network, None, history=[(name, outputs, list(ids)) for name, outputs, ids in pruner.pruning_history()]
        )


def adopt(original: nn.Module, network: Network, image: Tensor) -> Network:
    """Return a network of torch-pruning as our supernet makes it of the same original, so that `reconstruct` knows it.

    The supernet has the channels that are left first.

    Raises:
        ValueError: the two compute different functions.
    """
    graph = convert(original, image).graph
    left = [np.ones(strand.size, dtype=bool) for strand in graph.strands]
    for name, outputs, removed in network.history:
        units = graph.places[f"{name}.weight", 0 if outputs else 1]
        pairs = list(zip(units.strand, units.rank, strict=True))
        alive = [(strand, rank) for strand, rank in pairs if strand < 0 or left[strand][rank]]
        for strand, rank in [alive[index] for index in removed]:
            left[strand][rank] = False
    orders = {index: np.argsort(~units, kind="stable") for index, units in enumerate(left)}
    supernet = convert(permute_units(original, graph, orders), image, min=1).eval()
    counts = {strand.group: int(units.sum()) // strand.ratio for strand, units in zip(graph.strands, left, strict=True)}
    widths = {name: counts[index] for index, name in enumerate(supernet.space.names)}
    model = supernet.extract(supernet.space.from_dict(widths)).eval()
    with torch.no_grad():
        expected, outputs = network.model.eval()(image), model(image)
    if not torch.allclose(outputs, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise ValueError("the extracted model computes another function than torch-pruning's")
    return Network(model, supernet)


METHODS: dict[str, Callable[[Task], Iterator[Network]]] = {
    "searched": search_widths,
    "searched by outputs": search_by_outputs,
    "slim by default": slim_by_default,
    "searched, few parameters": search_few_parameters,
    "searched at once": search_at_once,
    "supernet, searched": search_supernet,
    "uniform": take_uniform,
    "importance": rank_importance,
    "isomorphic": rank_isomorphic,
    "torch-pruning, taylor": prune_by_taylor,
    "torch-pruning, taylor, one gradient": prune_once_by_taylor,
    "torch-pruning, magnitude": prune_by_magnitude,
    "torch-pruning, isomorphic": prune_isomorphic,
}
"""Ways by name; each yields a network for every share of the MACs."""
