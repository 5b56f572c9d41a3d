"""Search the widths of every layer by greedy slimming, for several budgets in one descent.

    python recipes/search.py runs/digits --budgets macs=50% macs=25%
    accelerate launch --multi_gpu --num_processes 8 recipes/search.py runs/imagenet --budgets macs=300M

Candidates are scored by their cross-entropy with the labels of the run's held-out training images, the same ones for
all, in batches that are normalised by their own statistics. RUN/search/searched.json then holds the networks and every
step of the descent, RUN/search/uniform.json the uniformly narrowed networks within the same budgets, and RUN/search.csv
the steps as a table. --baselines adds further methods to compare with; `python -m timm_autoslim report RUN` shows them
all.

Several processes share the scoring and come to the result that one would come to. While a search runs,
RUN/search-progress.json holds the scores: the same command goes on from there after an interruption, and comes to the
same result. A finished search is never replaced: rename or remove RUN/search to search again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F

from timm_autoslim import (
    METRICS,
    Budget,
    Conditions,
    Cost,
    HeldOut,
    LatencyTable,
    SearchResult,
    SharedLatency,
    Step,
    Supernet,
    Team,
    baseline,
    cost,
    files,
    parse_budgets,
    search,
    write_amount,
)
from timm_autoslim.errors import DataError, OutputExistsError
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.lib.image_sources import hash_images
from timm_autoslim.recipes.lib.images import open_images
from timm_autoslim.recipes.lib.loaders import load_batches
from timm_autoslim.recipes.lib.models import load_supernet, set_layout
from timm_autoslim.recipes.lib.networks import SEARCHED, is_searched, list_networks, write_results
from timm_autoslim.recipes.lib.ownership import own_folder
from timm_autoslim.recipes.lib.processes import describe_processes, make_accelerator
from timm_autoslim.recipes.lib.run_folder import SUPERNET, hash_file, read_args
from timm_autoslim.recipes.lib.scores import SavedScores
from timm_autoslim.recipes.lib.shell import run_command
from timm_autoslim.recipes.lib.splits import SPLIT, read_split
from timm_autoslim.recipes.lib.starting_points import take_gradients
from timm_autoslim.recipes.lib.teacher import create_teacher


def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    args = parse_args("search", __doc__, argv)
    run = Path(args.run)
    args = read_args(run, args)
    accelerator = make_accelerator(args)
    accelerator.print(describe_processes(accelerator))
    with own_folder(run, accelerator):
        if is_searched(run):
            raise OutputExistsError(
                f"{run}/search holds a finished search: to search again, rename or remove it first."
            )
        search_networks(accelerator, args, run, args.budgets)
    accelerator.end_training()


def search_networks(
    accelerator: Accelerator,
    args: argparse.Namespace,
    run: Path,
    requests: Sequence[str | Budget],
    original: Path | None = None,
) -> None:
    """Search the networks of all budgets, and choose those of the baselines.

    Args:
        accelerator: Accelerate's.
        args: the flags.
        run: the run folder.
        requests: the budgets, as the user wrote them or parsed.
        original: the run folder of a trained model, whose outputs score candidates in place of the labels.
    """
    supernet = load_supernet(run, args)
    team = Team(accelerator.process_index, accelerator.num_processes, gather_object)
    conditions = make_conditions(args, requests, team)
    # refuses those out of reach
    budgets = list(dict.fromkeys(parse_budgets(supernet, requests, conditions=conditions)))
    for budget in budgets:
        limits = " and ".join(METRICS[metric].format(limit) for metric, limit in budget.limits)
        accelerator.print(f"budget {budget.text}: at most {limits}; within reach")
    batches = load_held_out(args, run, accelerator)
    set_layout(args, supernet.to(accelerator.device))
    images = sum(len(targets) for _, targets in batches)
    widest = count_widest(supernet, budgets, conditions)
    accelerator.print(
        f"{args.model}: {write_amount(widest.macs, 2)} MACs, {write_amount(widest.params, 3)} params; "
        f"{images} held-out images in {len(batches)} batches, scored by "
        + ("the outputs of the original" if original else "their labels")
    )
    settings = describe_settings(run, args, images)
    if original:
        batches = take_outputs(accelerator, args, original, batches)
        settings["original"] = hash_file(original / SUPERNET)
    scores = SavedScores(run / "search-progress.json", settings, accelerator)
    with scores:
        shared = {"conditions": conditions, "scores": scores, "team": team, "seed": args.seed}
        evaluate = HeldOut(batches, functools.partial(score, accelerator))
        begin = time.perf_counter()
        searched = search(
            supernet, budgets, evaluate, mode=args.mode, rank=args.rank, steps=args.steps, refine=args.refine, **shared
        )
        results = {SEARCHED: dataclasses.replace(searched, seconds=time.perf_counter() - begin)}
        if {"importance", "isomorphic"}.intersection(args.baselines) and args.criterion == "taylor":
            take_gradients(supernet.model, F.cross_entropy, load_ordering(args, run, accelerator))
        for method in dict.fromkeys(args.baselines):
            results[method] = baseline(
                supernet, budgets, evaluate, method, candidates=args.candidates, criterion=args.criterion, **shared
            )
    if accelerator.is_main_process:
        write_steps(run / "search.csv", results[SEARCHED].steps)
        write_results(run, results)  # which marks the end
        print_results(results)
        print(f"Search: {run / 'search'}")
        scores.path.unlink(missing_ok=True)


def score(accelerator: Accelerator, subnet: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> float:
    """Return the cross-entropy of a subnet on a batch of held-out images, in the precision of the run."""
    inputs, targets = batch  # (N, C, H, W), and (N,) or probabilities (N, classes)
    with accelerator.autocast():
        outputs = subnet(inputs)  # (N, classes)
    return F.cross_entropy(outputs.float(), targets).item()


def take_outputs(
    accelerator: Accelerator, args: argparse.Namespace, original: Path, batches: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Return the batches with the probabilities (N, classes) of a trained model, of a run folder, as their targets."""
    teacher = create_teacher(argparse.Namespace(**vars(args) | {"teacher": str(original)})).to(accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        return [(inputs, teacher(inputs).float().softmax(1)) for inputs, _ in batches]


def make_conditions(args: argparse.Namespace, budgets: Sequence[str | Budget], team: Team) -> Conditions:
    """Return what peak_bytes and latency_ms are counted for; the first process alone opens the table of latencies.

    Raises:
        LatencyError: an unknown device, or a table of another one.
    """
    if not any("latency_ms" in (budget.metrics if isinstance(budget, Budget) else budget) for budget in budgets):
        return Conditions(args.cost_batch_size)
    table = None
    if team.index == 0:
        table = LatencyTable(
            args.latency_table or Path(args.run) / "latency.json", device=args.latency_device,
            batch_size=args.cost_batch_size, runtime=args.latency_runtime, threads=args.latency_threads,
        )  # fmt: skip
    return Conditions(args.cost_batch_size, latency=SharedLatency(table, team))


def count_widest(supernet: Supernet, budgets: Sequence[Budget], conditions: Conditions) -> Cost:
    """Return the cost of the widest subnet, in all metrics that a budget limits."""
    metrics = {metric for budget in budgets for metric in budget.metrics}
    return cost(
        supernet,
        batch_size=conditions.batch_size if "peak_bytes" in metrics else None,
        latency=conditions.latency if "latency_ms" in metrics else None,
    )


def load_held_out(args: argparse.Namespace, run: Path, accelerator: Accelerator) -> list[tuple[Tensor, Tensor]]:
    """Load the run's held-out images in batches: inputs (N, C, H, W) and targets (N,).

    Raises:
        DataError: the run's split holds out none.
    """
    images = open_images(args)
    _, held_out = read_split(run, len(images.train))
    if not held_out:
        raise DataError(f"{run}/{SPLIT} lists no held-out images: train a supernet with --held-out above 0.")
    return load_batches(args, images.train, held_out[: args.images or None], accelerator)


def load_ordering(args: argparse.Namespace, run: Path, accelerator: Accelerator) -> list[tuple[Tensor, Tensor]]:
    """Load the training images that the importance of channels is measured on."""
    images = open_images(args)
    training, _ = read_split(run, len(images.train))
    return load_batches(args, images.train, training[: args.order_images], accelerator)


def describe_settings(run: Path, args: argparse.Namespace, images: int) -> dict[str, Any]:
    """Return what a score depends on besides the widths: weights, images, and how the subnets run."""
    flags = {key: vars(args)[key] for key in ("batch_size", "amp", "amp_dtype", "channels_last")}
    files = hash_images(open_images(args).train)  # which may lie elsewhere now
    hashes = {"supernet": hash_file(run / SUPERNET), "held_out": hash_file(run / SPLIT), "images_sha256": files}
    return {**hashes, "images": images, **flags}


def print_results(results: dict[str, SearchResult]) -> None:
    """Print the networks, the groups that could not be narrowed further, and the work of each method."""
    for network in list_networks(results):
        spent = network.cost
        texts = [f"{write_amount(spent.macs, 2):>11} MACs {write_amount(spent.params, 3):>9} params"]
        metrics = [metric for metric in network.limits if metric not in ("macs", "params")]
        texts += [METRICS[metric].format(spent.pick(metric)) for metric in metrics]
        print(f"{network.name:32s} {'  '.join(texts)}  loss {network.loss:.4f}")
        result = results[network.method]
        if network.method == SearchResult.SEARCHED and (names := result.list_narrowest(network)):
            print(f"{'':32s} {len(names)} of {len(result.groups)} groups at their least width: {', '.join(names)}")
    for method, result in results.items():
        work = f"{result.evaluated_macs / 1e12:.4g}T MACs of forward work (images x MACs)"
        print(f"{method}: {result.evaluations} subnets scored, {work}")


def write_steps(path: Path, steps: Sequence[Step]) -> None:
    """Write the steps of the descent as a table."""
    text = io.StringIO()
    names = ["index", "group", "width", "loss", "macs", "params", "evaluations"]
    table = csv.DictWriter(text, fieldnames=names, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(dataclasses.asdict(step) for step in steps)
    files.write_text(path, text.getvalue())


if __name__ == "__main__":
    run_command(main)
