"""Ways to make a slim model of a trained one: ours, and those of torch-pruning."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from timm_autoslim import HeldOut, Supernet, baseline, convert, cost, reconstruct, search

Batches = list[tuple[Tensor, Tensor]]  # images (N, 3, H, W) and classes (N,)


@dataclass(frozen=True)
class Task:
    """What every way of slimming gets.

    Attributes:
        model: the trained model; it is not changed.
        gradients: training images that importance is measured on.
        held_out: training images that subnets are ranked on, in parts.
        batches: training images (N, 3, H, W) that networks between two searches are reconstructed on.
        shares: of the model's MACs, falling.
        seed: of what is drawn.
    """

    model: nn.Module
    gradients: Batches
    held_out: Batches
    batches: list[Tensor]
    shares: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class Network:
    """A slim model.

    Attributes:
        model: cut out, neither calibrated nor trained.
        supernet: what it was extracted from; None for those of torch-pruning, which `reconstruct` does not know.
        seconds: CPU seconds that it took to find it, and the networks before it.
        work: images times MACs of the forwards that chose it; 0 if nothing was scored.
    """

    model: nn.Module
    supernet: Supernet | None
    seconds: float
    work: int


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Return the MACs of convolutions and linear layers for one image (1, 3, H, W)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return int(counter.get_total_flops()) // 2


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
    start, work = time.process_time(), 0
    model, whole = task.model, count_macs(task.model, task.batches[0][:1])
    for share in task.shares:
        supernet = make_supernet(replace(task, model=model))
        evaluate = HeldOut(task.held_out, score)
        result = search(supernet, {"macs": round(share * whole)}, evaluate, seed=task.seed)
        work += result.evaluated_macs
        widths = result.networks[0].widths
        yield Network(supernet.extract(widths), supernet, time.process_time() - start, work)
        if share != task.shares[-1]:
            model = supernet.extract(widths).eval()
            reconstruct(model, supernet, task.batches, memory_mib=4096)


def search_at_once(task: Task) -> Iterator[Network]:
    """Search on the trained model itself, one descent through all shares."""
    start = time.process_time()
    supernet = make_supernet(task)
    result = search(supernet, {"macs": _to_macs(supernet, task)}, HeldOut(task.held_out, score), seed=task.seed)
    seconds = time.process_time() - start
    for network in result.networks:
        yield Network(supernet.extract(network.widths), supernet, seconds, result.evaluated_macs)


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
    start = time.process_time()
    supernet = make_supernet(task, order)
    collect_gradients(supernet.model, task.gradients)
    budgets = {"macs": _to_macs(supernet, task)}
    result = baseline(supernet, budgets, lambda subnet: 0.0, method, criterion="taylor")
    for network in result.networks:
        yield Network(supernet.extract(network.widths), supernet, time.process_time() - start, 0)


def _to_macs(supernet: Supernet, task: Task) -> list[int]:
    return [round(share * cost(supernet).macs) for share in task.shares]


def prune_by_taylor(task: Task) -> Iterator[Network]:
    """Global first-order importance (Molchanov et al., arXiv 1906.10771) over the groups of DepGraph."""
    yield from _prune(task, tp.importance.GroupTaylorImportance())


def prune_by_magnitude(task: Task) -> Iterator[Network]:
    """Global group magnitude (DepGraph, arXiv 2301.12900)."""
    yield from _prune(task, tp.importance.GroupMagnitudeImportance(p=2))


def prune_isomorphic(task: Task) -> Iterator[Network]:
    """First-order importance, ranked within groups of the same structure (arXiv 2407.04616)."""
    yield from _prune(task, tp.importance.GroupTaylorImportance(), isomorphic=True)


def _prune(task: Task, importance: Any, **options: Any) -> Iterator[Network]:
    start, image = time.process_time(), task.gradients[0][0][:1]
    model = copy.deepcopy(task.model)
    collect_gradients(model, task.gradients)
    whole = count_macs(model, image)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model, image, importance=importance, global_pruning=True, pruning_ratio=0.95, iterative_steps=300,
        ignored_layers=[head], **options,
    )  # fmt: skip
    for share in task.shares:
        while count_macs(model, image) > share * whole:
            pruner.step()
        network = copy.deepcopy(model)
        network.zero_grad()
        yield Network(network, None, time.process_time() - start, 0)


METHODS: dict[str, Callable[[Task], Iterator[Network]]] = {
    "searched": search_widths,
    "searched at once": search_at_once,
    "uniform": take_uniform,
    "importance": rank_importance,
    "isomorphic": rank_isomorphic,
    "torch-pruning, taylor": prune_by_taylor,
    "torch-pruning, magnitude": prune_by_magnitude,
    "torch-pruning, isomorphic": prune_isomorphic,
}
"""Ways by name; each yields a network for every share of the MACs."""
