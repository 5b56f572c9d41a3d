"""Search the widths of every layer by greedy slimming, for several budgets in one descent.

    python recipes/search.py runs/digits --budgets macs=50% macs=25%
    accelerate launch --multi_gpu --num_processes 8 recipes/search.py runs/imagenet --budgets macs=300M

Candidates are scored by their cross-entropy on the run's held-out training images, the same ones for all, in batches
that are normalised by their own statistics. The run folder then holds search.json (the networks found, the uniformly
narrowed ones that meet the same budgets, and every step of the descent) and search.csv (the steps as a table).
--baselines adds further methods to compare with; `python -m timm_autoslim report RUN` shows them all.

Several processes share the scoring and find what one would find. While a search runs, search-progress.json keeps what
was scored: the same command goes on from there after an interruption, and comes to the same result.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from common import check_numbers, command, load_supernet, parse_args, read_args, write_json
from data import in_memory, open_images, read_split
from processes import make_accelerator
from progress import Progress
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import timm_autoslim
from timm_autoslim import HeldOut, SharedLatency, Team
from timm_autoslim.costs.cost import cost_by_module
from timm_autoslim.errors import DataError
from timm_autoslim.slimming.budgets import Budget, parse_limits, read_budgets
from timm_autoslim.utils.files import write_text


def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    args = parse_args("search", __doc__, argv)
    run = Path(args.run)
    texts = budget_texts(args.budgets)
    check_numbers(args, {0: ("images",), 1: ("candidates", "steps", "cost_batch_size", "latency_threads")})
    args = read_args(run, args)
    accelerator = make_accelerator(args)
    accelerator.print(f"{accelerator.num_processes} process(es) on {accelerator.device}")

    supernet = load_supernet(run, args)
    team = Team(accelerator.process_index, accelerator.num_processes, gather_object)
    supernet.conditions = conditions(args, texts, team)
    widest = timm_autoslim.cost(supernet)
    asked = {parse_limits(text, widest): text for text in texts}
    texts = list(asked.values())  # each budget once
    for budget in read_budgets(supernet, texts):  # refuses those out of reach
        limits = " and ".join(f"{said(unit, limit)} {unit}" for unit, limit in budget.limits)
        accelerator.print(f"budget {asked[budget]}: at most {limits}; within reach")
    chunks = held_out_images(args, run, accelerator)
    supernet.to(accelerator.device)
    if args.channels_last:
        supernet.to(memory_format=torch.channels_last)

    def score(subnet: Callable[[Tensor], Tensor], chunk: tuple[Tensor, Tensor]) -> float:
        inputs, targets = chunk
        with accelerator.autocast():
            outputs = subnet(inputs)  # (N, classes)
        return F.cross_entropy(outputs.float(), targets).item()

    total = sum(len(targets) for _, targets in chunks)
    accelerator.print(
        f"{args.model}: {widest.macs / 1e6:.2f}M MACs, {widest.params / 1e6:.3f}M params; "
        f"{total} held-out images in {len(chunks)} batches"
    )
    progress = Progress(run / "search-progress.json", setting(run, args, total), accelerator)
    begin = time.perf_counter()
    with progress, Descent(widest, list(asked), disable=not accelerator.is_main_process) as descent:
        shared = {"scores": progress, "team": team, "seed": args.seed}
        evaluate = HeldOut(chunks, score)
        results = {"searched": timm_autoslim.search(
            supernet, texts, evaluate, mode=args.mode, rank=args.rank, steps=args.steps, refine=args.refine,
            on_step=descent.show, **shared,
        )}  # fmt: skip
        seconds = time.perf_counter() - begin
        for kind in dict.fromkeys(args.baselines):
            descent.set_postfix_str(f"baseline {kind}")
            results[kind] = timm_autoslim.baseline(
                supernet, texts, evaluate, kind, candidates=args.candidates, criterion=args.criterion, **shared
            )
    if accelerator.is_main_process:
        write_results(run, args, supernet, asked, results, {"images": total, "seconds": seconds})
        progress.path.unlink(missing_ok=True)
    accelerator.end_training()


def conditions(args: argparse.Namespace, texts: Sequence[str], team: Team) -> timm_autoslim.Conditions:
    """What peak_bytes and latency_ms are counted for; if a budget needs a table of latencies, one process has it open.

    Raises:
        LatencyError: an unknown device, or a table of another one.
    """
    if not any("latency_ms" in text for text in texts):
        return timm_autoslim.Conditions(args.cost_batch_size)
    table = None
    if team.index == 0:
        table = timm_autoslim.LatencyTable(
            args.latency_table or Path(args.run) / "latency.json", device=args.latency_device,
            batch_size=args.cost_batch_size, runtime=args.latency_runtime, threads=args.latency_threads,
        )  # fmt: skip
    return timm_autoslim.Conditions(args.cost_batch_size, latency=SharedLatency(table, team))


def said(unit: str, number: float) -> str:
    """A cost as it is printed: milliseconds as they are, all else in millions."""
    return f"{number:.3f}" if unit == "latency_ms" else f"{number / 1e6:.3f}M"


def held_out_images(args: argparse.Namespace, run: Path, accelerator: Accelerator) -> list[tuple[Tensor, Tensor]]:
    """The run's held-out images in batches: inputs (N, C, H, W) and targets (N,).

    Raises:
        DataError: the run's split holds out none, or fewer than --images.
    """
    images = open_images(args)
    _, held_out = read_split(run, len(images.train))
    if not held_out:
        raise DataError(f"{run}/held_out.json lists no held-out images: train a supernet with --held-out above 0.")
    if args.images > len(held_out):
        raise DataError(f"--images {args.images}: {run}/held_out.json lists {len(held_out)} only; 0 takes all of them.")
    return in_memory(args, images.train, held_out[: args.images or None], accelerator)


def setting(run: Path, args: argparse.Namespace, images: int) -> dict[str, Any]:
    """What a score depends on besides the widths: weights, images, and how they are run."""
    weights = hashlib.sha256((run / "supernet.safetensors").read_bytes()).hexdigest()
    split = hashlib.sha256((run / "held_out.json").read_bytes()).hexdigest()
    flags = {key: vars(args)[key] for key in ("data_dir", "dataset", "batch_size", "amp", "amp_dtype", "channels_last")}
    return {"supernet": weights, "held_out": split, "images": images, **flags}


def budget_texts(given: Sequence[str]) -> list[str]:
    """The budgets as texts that the search reads: `macs=50%` is `macs<=50%`; several limits at once stand as given."""
    texts = [text if "<=" in text else text.replace("=", "<=", 1) for text in given]
    return list(dict.fromkeys(" ".join(text.split()) for text in texts))


def write_results(
    run: Path,
    args: argparse.Namespace,
    supernet: timm_autoslim.Supernet,
    asked: dict[Budget, str],
    results: dict[str, timm_autoslim.SearchResult],
    figures: dict[str, Any],
) -> None:
    """Write search.json and search.csv, and print the networks."""
    networks = []
    for group in zip(*(result.networks for result in results.values()), strict=True):  # of one budget
        text = asked[Budget(tuple(group[0].limits.items()))]
        units = list(group[0].limits)  # in the order of the text
        amounts = [part.partition("<=")[2].replace(" ", "") for part in text.split(" and ")]
        name = "-".join(f"{u}-{a.replace('%', 'pct')}" for u, a in zip(units, amounts, strict=True))
        for kind, found in zip(results, group, strict=True):
            networks.append({
                "name": f"{name}-{kind}", "kind": kind, "asked": " and ".join(amounts),
                **found.to_dict(), "unit": " and ".join(units), "layers": cost_by_module(supernet, found.widths),
            })  # fmt: skip
            spent = f"{found.cost.macs / 1e6:10.2f}M MACs {found.cost.params / 1e6:8.3f}M params"
            others = [f"{said(u, getattr(found.cost, u))} {u}" for u in units if u in ("peak_bytes", "latency_ms")]
            print(f"{networks[-1]['name']:32s} {'  '.join([spent, *others])}  loss {found.error:.4f}")
    searched = results["searched"].to_dict()
    write_trace(run / "search.csv", searched["steps"])
    flags = {key: vars(args)[key] for key in ("model", "mode", "rank", "refine", "steps", "budgets", "seed")}
    write_json(run / "search.json", {
        "format": 1, **flags, **figures, "groups": {g.name: g.size for g in supernet.space.groups},
        "widest": {**dataclasses.asdict(timm_autoslim.cost(supernet)), "layers": cost_by_module(supernet)},
        "work": {k: {"evaluations": r.evaluations, "evaluated_macs": r.evaluated_macs} for k, r in results.items()},
        **searched, "networks": networks,
    })  # fmt: skip
    for kind, result in results.items():
        work = f"{result.evaluated_macs / 1e12:.4g}T MACs of forward work (images x MACs)"
        print(f"{kind}: {result.evaluations} subnets scored, {work}")
    print(f"Search: {run / 'search.json'}")


def write_trace(path: Path, steps: list[dict[str, Any]]) -> None:
    """The steps of the descent as a table."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=["index", "group", "width", "error", "macs", "params", "evaluations"],
                           extrasaction="ignore", lineterminator="\n")  # fmt: skip
    table.writeheader()
    table.writerows(steps)
    write_text(path, text.getvalue())


class Descent(tqdm):
    """Progress bar of the descent: how far towards the smallest budgets, and what the last step did."""

    def __init__(self, widest: timm_autoslim.Cost, budgets: Sequence[Budget], disable: bool = False) -> None:
        bar_format = "{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
        super().__init__(total=100, unit="%", bar_format=bar_format, disable=disable)
        limits = [limit for budget in budgets for limit in budget.limits]
        self.goals = {
            unit: sorted({number for of, number in limits if of == unit}, reverse=True)
            for unit in dict.fromkeys(of for of, _ in limits)
        }
        self.widest = {unit: getattr(widest, unit) for unit in self.goals}

    def show(self, step: timm_autoslim.Step) -> None:
        """Called by the search after each step."""
        shares, ahead = [], []
        for unit, goals in self.goals.items():
            now, start = step.spent[unit], self.widest[unit]
            shares.append(min(1.0, (start - now) / max(start - goals[-1], 1e-9)))
            ahead += [f"{now / goal - 1:+.1%} {unit} to {said(unit, goal)}" for goal in goals if now > goal][:1]
        self.n = round(100 * min(shares), 1)
        self.set_postfix_str(f"{step.group} -> {step.width}, loss {step.error:.4f}, {', '.join(ahead) or 'done'}")


if __name__ == "__main__":
    command(main)
