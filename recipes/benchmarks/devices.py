"""How much time a share of the MACs is, by model, runtime and widths: the table of docs/howto/devices.md.

    python recipes/benchmarks/devices.py                                     # docs/results/devices.jsonl
    python recipes/benchmarks/devices.py --table docs/howto/devices.md       # and the table in the page
    python recipes/benchmarks/devices.py --results runs/devices.jsonl --models resnet18 --runtimes eager

Each model of timm has random weights and is slimmed uniformly: to three shares of its MACs with widths that are
multiples of 16, and to a half with any widths. All its networks run one image in turns, so that a slow minute meets all
of them alike. Time is CPU time of the process, so that other work on the machine counts less. A row is a model in a
runtime; a run that is started again goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

from timm_autoslim import RUNTIMES, Supernet, Widths, convert, cost, uniform_at
from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table

MODELS = ("mobilenetv2_100", "resnet18", "convnext_atto", "vit_tiny_patch16_224")
SHARES = (0.75, 0.5, 0.25)
DIVISOR = 16
LABELS = {"eager": "PyTorch, eager", "onnxruntime": "ONNX Runtime"}


def choose_widths(model: nn.Module, images: torch.Tensor) -> list[tuple[str, Supernet, Widths]]:
    """Return the networks of a model: what their widths are, a supernet, and the widths."""
    aligned, free = convert(model, images, divisor=DIVISOR), convert(model, images)
    widest = cost(aligned).macs
    networks = []
    for share in SHARES:
        ratios = [ratio / 200 for ratio in range(200, 0, -1)]
        within = (w for w in map(aligned.space.uniform, ratios) if cost(aligned, w).macs <= share * widest)
        networks.append((str(DIVISOR), aligned, next(within)))
    return [*networks, ("any", free, uniform_at(free, "macs", "50%"))]


def time_turns(runs: Sequence[Callable[[], Any]], turns: int, repeats: int) -> list[list[float]]:
    """Return the milliseconds of CPU time of a run, by run and turn: each the median of some repeats."""

    def time_one(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(repeats):
            begin = time.process_time()
            run()
            times.append(time.process_time() - begin)
        return 1e3 * statistics.median(times)

    for run in runs:
        run()
        run()
    rounds = [[time_one(run) for run in runs] for _ in range(turns)]
    return [list(times) for times in zip(*rounds, strict=True)]


def measure(name: str, runtime: str, size: int, turns: int, repeats: int) -> dict[str, Any]:
    """Return the times of the original and of its networks in one runtime."""
    torch.manual_seed(0)
    model, images = timm.create_model(name).eval(), torch.randn(1, 3, size, size)
    networks = choose_widths(model, images)
    models = [model, *(supernet.extract(widths).eval() for _, supernet, widths in networks)]
    with torch.no_grad():
        runs = [RUNTIMES[runtime].start(model, images, 1) for model in models]
        times = time_turns(runs, turns, repeats)
    widest = cost(networks[0][1]).macs
    shares = [cost(supernet, widths).macs / widest for _, supernet, widths in networks]
    return {
        "model": name, "runtime": runtime, "size": size, "device": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "repeats": repeats,
        "widths": [widths for widths, _, _ in networks], "macs": [round(share, 4) for share in shares],
        "milliseconds": [[round(value, 4) for value in turn] for turn in times],
    }  # fmt: skip


def compute_ratios(row: dict[str, Any]) -> list[float]:
    """Return the median time of each network of a row, as a share of the original's."""
    first, *others = (statistics.median(times) for times in row["milliseconds"])
    return [other / first for other in others]


def compute_spread(rows: Sequence[dict[str, Any]]) -> float:
    """Return the largest distance of a quartile of the ratios of single turns from the ratio of the medians."""
    largest = 0.0
    for row in rows:
        first, *others = row["milliseconds"]
        for ratio, times in zip(compute_ratios(row), others, strict=True):
            quartiles = statistics.quantiles([a / b for a, b in zip(times, first, strict=True)], n=4)
            largest = max(largest, abs(quartiles[0] - ratio), abs(quartiles[2] - ratio))
    return largest


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of the page, with a sentence about the spread."""
    runtimes = [runtime for runtime in LABELS if any(row["runtime"] == runtime for row in rows)]
    titles = " | ".join(LABELS[runtime] for runtime in runtimes)
    lines = [f"| model | widths | MACs | {titles} |", f"|---|---|---|{'---|' * len(runtimes)}"]
    for name in dict.fromkeys(row["model"] for row in rows):
        by_runtime = {row["runtime"]: row for row in rows if row["model"] == name}
        row = next(iter(by_runtime.values()))
        ratios = {runtime: compute_ratios(row) for runtime, row in by_runtime.items()}
        for index, (widths, macs) in enumerate(zip(row["widths"], row["macs"], strict=True)):
            cells = [_write(ratios[runtime][index]) if runtime in ratios else "" for runtime in runtimes]
            lines.append(f"| {'' if index else name} | {widths} | {macs:.2f} | {' | '.join(cells)} |")
    spreads = [
        f"{compute_spread([row for row in rows if row['runtime'] == runtime]):.2f} in {LABELS[runtime]}"
        for runtime in runtimes
    ]
    return "\n".join([*lines, "", f"Half of the turns have ratios within {' and '.join(spreads)} of these."])


def _write(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}"


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, "docs/results/devices.jsonl")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5, help="runs of a turn, of which the median counts")
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    rows = Results(args.results)
    done = {(row["model"], row["runtime"]) for row in rows}
    todo = [] if args.only_table else [job for job in product(args.models, args.runtimes) if job not in done]
    for name, runtime in tqdm(todo, unit="row"):
        rows.add(measure(name, runtime, args.img_size, args.turns, args.repeats))
    if not rows:
        raise SystemExit(f"{rows.path}: has no row yet")
    table = make_table(rows)
    print(table)
    if args.table:
        put_table(args.table, "devices", table)


if __name__ == "__main__":
    main()
