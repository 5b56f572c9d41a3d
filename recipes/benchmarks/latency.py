"""How far predicted latencies are from measured ones, and what the predictions cost: a table of docs/benchmarks.md.

    python recipes/benchmarks/latency.py --results runs/latency                       # all models, eager
    python recipes/benchmarks/latency.py --results runs/latency --models resnet50 --runtime onnxruntime
    python recipes/benchmarks/latency.py --results runs/latency --page docs/benchmarks.md --only-table

For each model there is a supernet with random weights, and subnets that the fit is not made of: one half with random
widths in every group, one half with random multipliers. Each is predicted from the table of operators, and measured as
an extracted model, in turns with the subnets of the fit, so that a slow minute slows all of them alike. The predictions
of an earlier fit, which a search would have used, are given too. Run it on a machine that does nothing else. A run that
is started again goes on with the models and runtimes that have no result yet; the tables of operators are in the
results folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from timm_autoslim import RUNTIMES, LatencyReport, LatencyTable, Supernet, Widths, convert
from timm_autoslim.recipes.benchmarks.lib.results import Results, put_table

MODELS = {"resnet50": 96, "mobilenetv2_100": 128, "vit_tiny_patch16_224": 112}  # with the side of their images


def make_supernet(name: str) -> Supernet:
    """Return the supernet of a model with random weights."""
    torch.manual_seed(0)
    size = MODELS[name]
    model = timm.create_model(name, **({"img_size": size} if "vit" in name else {})).eval()
    return convert(model, torch.zeros(1, 3, size, size))


def draw_subnets(supernet: Supernet, count: int) -> list[Widths]:
    """Return subnets that no fit is made of."""
    space, generator = supernet.space, torch.Generator().manual_seed(7)
    independent = [space.sample(generator) for _ in range(count // 2)]
    return independent + [space.sample_multiplier(generator) for _ in range(count - len(independent))]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return predicted and measured latencies of one model, and the time that predictions took."""
    supernet = make_supernet(name)
    path = args.results / f"table-{args.device}-{args.threads}.json"
    table = LatencyTable(
        path, device=args.device, threads=args.threads, batch_size=args.batch_size, runtime=args.runtime
    )
    subnets = draw_subnets(supernet, args.subnets)
    start = time.perf_counter()
    predicted = [table.predict(supernet, widths) for widths in tqdm(subnets, desc=f"{name}: predicted", leave=False)]
    seconds = time.perf_counter() - start
    report = table.report(supernet, subnets, rounds=args.rounds)
    device = json.loads(path.read_text(encoding="utf-8"))["device"]  # the name of the processor or GPU
    return {
        "model": name, "size": MODELS[name], "runtime": args.runtime, "device": device,
        "threads": args.threads, "batch_size": args.batch_size, "torch": torch.__version__, "operators": len(table),
        "seconds": seconds, "predicted_before_ms": predicted, "predicted_ms": report.predicted_ms,
        "measured_ms": report.measured_ms,
    }  # fmt: skip


def make_row(result: dict[str, Any]) -> str:
    """Return one line of the table."""
    measured = tuple(result["measured_ms"])
    report, before = (
        LatencyReport((), measured, tuple(result[key])) for key in ("predicted_ms", "predicted_before_ms")
    )
    return (
        f"| {result['model']}, {result['size']} pixels | {result['runtime']} | {len(measured)} "
        f"| {min(measured):.1f} to {max(measured):.1f} | {report.median_error:.1%} | {max(report.errors):.1%} "
        f"| {report.rank_correlation:.3f} | {before.median_error:.1%} | {result['seconds'] / len(measured):.1f} |"
    )


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the part of the page between its markers."""
    first = results[0]
    return "\n".join([
        f"{first['device']}, {first['threads']} thread(s), batch {first['batch_size']}, torch {first['torch']}. "
        "Seconds are those of a prediction, measuring new operators and fitting included.", "",
        "| model | runtime | subnets | measured ms | median error | largest error | rank correlation "
        "| median error of an earlier fit | s a subnet |",
        "|---|---|---|---|---|---|---|---|---|", *map(make_row, results),
    ])  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/latency"))
    parser.add_argument("--page", type=Path, help="write the table between the markers of this page")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runtime", choices=list(RUNTIMES), default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--subnets", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9, help="turns that each subnet has")
    parser.add_argument("--only-table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    results = Results(args.results / "results.jsonl")
    done = {(r["model"], r["runtime"], r["batch_size"]) for r in results}
    todo = [] if args.only_table else [n for n in args.models if (n, args.runtime, args.batch_size) not in done]
    for name in tqdm(todo, unit="model"):
        results.add(measure(name, args))
    if not results:
        raise SystemExit(f"{results.path}: has no result yet")
    print(make_table(results))
    if args.page:
        put_table(args.page, "latency", make_table(results))


if __name__ == "__main__":
    main()
