"""Search the widths of every layer by greedy slimming, for several budgets in one descent.

    python recipes/search.py runs/digits --budgets macs=50% macs=25%

Candidates are scored by their cross-entropy on the run's held-out training images, the same ones for all, each
normalised by batch statistics. The run folder then holds search.json (the networks found, the uniformly narrowed ones
that meet the same budgets, and every step of the descent) and search.csv (the steps as a table). With --method, a
baseline chooses the widths instead; it makes no steps.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import command, load_supernet, parse_args, read_args, write_json
from data import in_memory, open_images, read_split
from processes import make_accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import timm_autoslim
from timm_autoslim.costs import UNITS, Budget, parse_limits, uniform_within
from timm_autoslim.errors import BudgetError, ConfigError, DataError


def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    args = parse_args("search", __doc__, argv)
    run = Path(args.run)
    texts = budget_texts(args.budgets)
    if args.candidates < 1:
        raise ConfigError(f"--candidates {args.candidates}: at least 1 is needed.")
    args = read_args(run, args)
    accelerator = make_accelerator(args)
    if accelerator.num_processes > 1:
        raise ConfigError(f"search.py runs in one process, but {accelerator.num_processes} were launched.")

    supernet = load_supernet(run, args).to(accelerator.device)
    images = open_images(args)
    _, held_out = read_split(run, len(images.train))
    if args.images > len(held_out):
        raise DataError(f"--images {args.images}: {run}/held_out.json lists {len(held_out)} only; 0 takes all of them.")
    chunks = in_memory(args, images.train, held_out[: args.images or None], accelerator)
    total = sum(len(targets) for _, targets in chunks)

    @torch.no_grad()
    def evaluate(subnet: Callable[[Tensor], Tensor]) -> float:
        loss = torch.zeros((), dtype=torch.float64, device="cpu")
        for inputs, targets in chunks:
            with accelerator.autocast():
                outputs = subnet(inputs)  # (N, classes)
            loss += F.cross_entropy(outputs.float(), targets, reduction="sum").double().cpu()
        return loss.item() / total

    widest = timm_autoslim.cost(supernet, supernet.space.max())
    print(f"{args.model}: {widest.macs / 1e6:.2f}M MACs, {widest.params / 1e6:.3f}M params; {total} held-out images")
    asked = {parse_limits(text, widest): text for text in texts}
    texts = list(asked.values())
    if args.method == "greedy":
        with Descent(widest, list(asked)) as descent:
            result = timm_autoslim.search(
                supernet, texts, evaluate, rank=args.rank, steps=args.steps, refine=args.refine, on_step=descent.show
            )
    else:
        with tqdm(unit=" subnets") as bar:

            def counted(subnet: Callable[[Tensor], Tensor]) -> float:
                bar.update()
                return evaluate(subnet)

            result = timm_autoslim.baseline(
                supernet, texts, counted, args.method, candidates=args.candidates, criterion=args.criterion,
                seed=args.seed,
            )  # fmt: skip

    networks = []
    for found in result.networks:
        budget = Budget(tuple(found.limits.items()))
        units, amounts = zip(*(part.replace(" ", "").split("<=") for part in asked[budget].split(" and ")), strict=True)
        name = "-".join(f"{u}-{a.replace('%', 'pct')}" for u, a in zip(units, amounts, strict=True))
        kinds = [("searched" if args.method == "greedy" else args.method, found.widths, found.error)]
        if args.method != "uniform":
            uniform = uniform_within(supernet, budget)
            with supernet.at(uniform), timm_autoslim.batch_statistics(supernet.model):
                kinds.append(("uniform", uniform, evaluate(supernet)))
        for kind, widths, loss in kinds:
            cost = timm_autoslim.cost(supernet, widths)
            networks.append({
                "name": f"{name}-{kind}", "kind": kind, "unit": " and ".join(units), "asked": " and ".join(amounts),
                "budget": found.budget, "limits": dict(found.limits), "macs": cost.macs, "params": cost.params,
                "error": loss, "widths": widths.to_dict(),
            })  # fmt: skip
            figures = f"{cost.macs / 1e6:10.2f}M MACs {cost.params / 1e6:8.3f}M params  loss {loss:.4f}"
            print(f"{networks[-1]['name']:28s} {figures}")

    steps = result.to_dict()["steps"]
    write_trace(run / "search.csv", steps)
    write_json(run / "search.json", {
        "format": 1, "model": args.model, "method": args.method, "rank": args.rank, "refine": args.refine,
        "images": total, "budgets": args.budgets, "widest": {"macs": widest.macs, "params": widest.params},
        "networks": networks, "evaluations": result.evaluations, "evaluated_macs": result.evaluated_macs,
        "steps": steps,
    })  # fmt: skip
    print(f"Search: {run / 'search.json'}, {result.evaluations} subnets scored")


def budget_texts(given: Sequence[str]) -> list[str]:
    """The budgets as texts that the search reads: `macs=50%` is `macs<=50%`; several limits at once stand as given.

    Raises:
        BudgetError: not of the form UNIT=AMOUNT, or an unknown unit.
    """
    read_budgets([text for text in given if "<=" not in text])
    texts = [text if "<=" in text else text.replace("=", "<=", 1) for text in given]
    return list(dict.fromkeys(" ".join(text.split()) for text in texts))


def read_budgets(given: list[str]) -> dict[str, list[str]]:
    """`macs=50%` and the like, by unit.

    Raises:
        BudgetError: not of the form UNIT=AMOUNT, or an unknown unit.
    """
    budgets: dict[str, list[str]] = {}
    for text in given:
        unit, _, amount = text.partition("=")
        if unit not in UNITS or not amount:
            raise BudgetError(f"--budgets {text!r}: needed UNIT=AMOUNT, such as macs=50%, macs=300M or params=2.5M.")
        budgets.setdefault(unit, []).append(amount)
    return budgets


def write_trace(path: Path, steps: list[dict[str, Any]]) -> None:
    """The steps of the descent as a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=["index", "group", "width", "error", "macs", "params", "evaluations"],
                               extrasaction="ignore")  # fmt: skip
        table.writeheader()
        table.writerows(steps)


class Descent(tqdm):
    """Progress bar of the descent: how far towards the smallest budgets, and what the last step did."""

    def __init__(self, widest: timm_autoslim.Cost, budgets: Sequence[Budget]):
        super().__init__(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")
        self.widest = {unit: getattr(widest, unit) for unit in UNITS}
        limits = [limit for budget in budgets for limit in budget.limits]
        self.goals = {
            unit: sorted({number for of, number in limits if of == unit}, reverse=True)
            for unit in dict.fromkeys(of for of, _ in limits)
        }

    def show(self, step: timm_autoslim.Step) -> None:
        """Called by the search after each step."""
        shares, ahead = [], []
        for unit, goals in self.goals.items():
            now, start = getattr(step, unit), self.widest[unit]
            shares.append(min(1.0, (start - now) / max(start - goals[-1], 1)))
            ahead += [f"{now / goal - 1:+.1%} {unit} to {goal / 1e6:.2f}M" for goal in goals if now > goal][:1]
        self.n = round(100 * min(shares), 1)
        self.set_postfix_str(f"{step.group} -> {step.width}, loss {step.error:.4f}, {', '.join(ahead) or 'done'}")


if __name__ == "__main__":
    command(main)
