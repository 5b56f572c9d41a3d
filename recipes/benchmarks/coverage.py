"""Convert every model by name and write what can be slimmed: docs/coverage.md.

    python recipes/benchmarks/coverage.py --results runs/coverage.jsonl                 # all of timm and torchvision
    python recipes/benchmarks/coverage.py --results runs/coverage.jsonl --smallest      # one model of each class
    python recipes/benchmarks/coverage.py --results runs/coverage.jsonl --table docs/coverage.md --only-table

One process for each model, on the meta device, with a bound on memory and time. Results are one JSON line a model; a
run that is started again goes on with the models that have none.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

MARK = "coverage-result "


def measure(name: str) -> dict[str, Any]:
    """Convert one model on the meta device, and return its groups, its reach, its time, and what is fixed and why."""
    import torch

    import timm_autoslim
    from timm_autoslim.errors import AutoSlimError
    from timm_autoslim.registry import create_base

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = create_base(name)
    result: dict[str, Any] = {
        "name": name,
        "family": type(model).__name__,
        "params": sum(p.numel() for p in model.parameters()),
    }
    start = time.perf_counter()
    try:
        supernet = timm_autoslim.convert(model)
    except AutoSlimError as error:
        return result | {"error": f"{type(error).__name__}: {error}"[:400]}
    result["seconds"] = time.perf_counter() - start
    graph, sizes = supernet.graph, supernet.graph.group_sizes
    whole = timm_autoslim.cost(supernet)
    for key, widths in (("half", [max(1, n // 2) for n in sizes]), ("min", [1] * len(sizes))):
        cost = timm_autoslim.cost(supernet, supernet.space.from_dict(dict(zip(graph.names, widths, strict=True))))
        result |= {f"{key}_macs": cost.macs / whole.macs, f"{key}_params": cost.params / whole.params}
    reasons = Counter(r for r in graph.fixed.values() if "kernel" not in r).most_common(4)
    return result | {"groups": len(sizes), "macs": whole.macs, "repairs": supernet.repairs, "fixed": reasons}


def run_one(name: str, seconds: int, gigabytes: int) -> dict[str, Any]:
    """Measure one model in a process of its own; whatever happens to it is a result."""

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))

    command = [sys.executable, __file__, "--one", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, preexec_fn=bound, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"no result within {seconds} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    return {"name": name, "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:400]}


def names(smallest: bool) -> list[str]:
    """Return the names of timm's models and of torchvision's classification models."""
    import timm
    import torch
    import torchvision

    found = timm.list_models(exclude_filters="autoslim")
    found += [f"torchvision/{n}" for n in torchvision.models.list_models(module=torchvision.models)]
    if not smallest:
        return found
    from timm_autoslim.registry import create_base

    best: dict[str, tuple[int, str]] = {}
    for name in tqdm(found, desc="smallest of each class"):
        with torch.device("meta"):
            model = create_base(name)
        key = f"{type(model).__module__}.{type(model).__name__}"
        best[key] = min(best.get(key, (1 << 60, "")), (sum(p.numel() for p in model.parameters()), name))
    return sorted(name for _, name in best.values())


def table(results: list[dict[str, Any]]) -> str:
    """Return the page: totals, then one line a model, the least slimmable first within each family."""
    good = [r for r in results if "error" not in r]
    lines = ["# Coverage", "", "Made by `recipes/benchmarks/coverage.py` on the meta device, one core.", ""]
    lines += [f"- {len(good)} of {len(results)} models convert."]
    if good:
        times = [r["seconds"] for r in good]
        near = sum(r["half_macs"] <= 0.35 for r in good)
        lines += [
            f"- Half width leaves a median of {statistics.median(r['half_macs'] for r in good):.3f} of the MACs; "
            f"at most 0.35 for {near}, at most 0.55 for {sum(r['half_macs'] <= 0.55 for r in good)}.",
            f"- Trace, proof and conversion take a median of {statistics.median(times):.1f} s, "
            f"{max(times):.1f} s at most.",
        ]
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        families[result.get("family", "?")].append(result)
    lines += [
        "",
        "| family | model | params | groups | MACs at half | at width 1 | s | what is fixed most, or the error |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for family, members in sorted(families.items()):
        for r in sorted(members, key=lambda r: -r.get("half_macs", 2)):
            if "error" in r:
                lines.append(f"| {family} | {r['name']} | | | | | | {r['error'].replace('|', '/')} |")
                continue
            why = "; ".join(f"{n} x {reason}" for reason, n in r["fixed"][:2]) if r["half_macs"] > 0.35 else ""
            lines.append(
                f"| {family} | {r['name']} | {r['params'] / 1e6:.2f}M | {r['groups']} | {r['half_macs']:.3f} "
                f"| {r['min_macs']:.4f} | {r['seconds']:.1f} | {why.replace('|', '/')[:200]} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/coverage.jsonl"))
    parser.add_argument("--table", type=Path, help="write the page here")
    parser.add_argument("--smallest", action="store_true", help="only the smallest model of each class")
    parser.add_argument("--models", nargs="+", help="only these names")
    parser.add_argument("--only-table", action="store_true", help="convert nothing")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=300, help="time for one model")
    parser.add_argument("--gigabytes", type=int, default=16, help="address space for one model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(MARK + json.dumps(measure(args.one)))
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    results = [json.loads(line) for line in lines]
    done = {r["name"] for r in results}
    wanted = [] if args.only_table else args.models or names(args.smallest)
    todo = [n for n in wanted if n not in done]
    with ThreadPoolExecutor(args.jobs) as pool, args.results.open("a", encoding="utf-8") as file:
        waiting = [pool.submit(run_one, name, args.seconds, args.gigabytes) for name in todo]
        for future in tqdm(as_completed(waiting), total=len(waiting), unit="model"):
            results.append(future.result())
            file.write(json.dumps(results[-1]) + "\n")
            file.flush()
    if args.table:
        args.table.write_text(table(results), encoding="utf-8")
    failed = [r["name"] for r in results if "error" in r]
    print(f"{len(results) - len(failed)} of {len(results)} convert" + (f"; not: {', '.join(failed)}" if failed else ""))


if __name__ == "__main__":
    main()
