"""Convert every model by name and write what can be slimmed: docs/coverage.md.

    python recipes/benchmarks/coverage.py --results runs/coverage.jsonl                 # all of timm and torchvision
    python recipes/benchmarks/coverage.py --results runs/coverage.jsonl --smallest      # one model of each class
    python recipes/benchmarks/coverage.py --results runs/coverage.jsonl --table docs/coverage.md --only-table

One process for each model (forked, so that nothing is imported twice), with limits of memory and time. Models of at
most a hundred million parameters and `--equal` GMACs get random weights and are run: the widest subnet must equal the
model, and it and a random one their extracted models, bit for bit. Larger ones are converted on the meta device.
Results are one JSON line a model; a run that is started again goes on with the models that have none.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from timm_autoslim import Supernet, convert, create_base, create_meta_base, files, reach
from timm_autoslim.errors import AutoSlimError
from timm_autoslim.recipes.benchmarks.lib.children import describe_error, run_children
from timm_autoslim.recipes.benchmarks.lib.models import list_names
from timm_autoslim.recipes.benchmarks.lib.results import Results

MOST_PARAMS = 100_000_000  # a model with more is not built with weights


def measure_memory() -> float:
    """Return the highest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, equal: float) -> dict[str, Any]:
    """Convert one model; return groups, reach and time, what is fixed and why, and whether subnets are equal."""
    torch.set_num_threads(1)
    model = create_meta_base(name)
    result: dict[str, Any] = {
        "name": name,
        "family": type(model).__name__,
        "params": sum(p.numel() for p in model.parameters()),
    }
    weights = result["params"] < MOST_PARAMS
    if weights:
        torch.manual_seed(0)
        model = create_base(name).eval()
    before, start = measure_memory(), time.process_time()  # of one thread, so whatever else runs does not count
    try:
        supernet = convert(model)
    except AutoSlimError as error:
        return result | {"error": describe_error(error)}
    result |= {"seconds": time.process_time() - start, "gigabytes": measure_memory() - before}
    reached = reach(supernet)
    for key, cost in (("half", reached.half), ("min", reached.narrowest)):
        result |= {f"{key}_macs": cost.macs / reached.widest.macs, f"{key}_params": cost.params / reached.widest.params}
    result |= {
        "groups": len(supernet.space),
        "macs": reached.widest.macs,
        "repairs": supernet.repairs,
        "unruled": supernet.unruled,
        "obstacles": reached.obstacles[:6],
    }
    if weights and reached.widest.macs <= equal * 1e9:
        result["equal"] = check_equal(supernet)
    return result


@torch.no_grad()
def check_equal(supernet: Supernet) -> bool:
    """Whether the widest subnet gives the model's outputs, and it and a random one those of their extracted models."""
    model, space = supernet.model, supernet.space
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size", (3, 224, 224))
    images = torch.randn(1, *size)
    subnets = (space.max(), space.sample(torch.Generator().manual_seed(0)))
    return _same(model(images), supernet(images)) and all(
        _same(supernet(images, widths), supernet.extract(widths)(images)) for widths in subnets
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    values = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
    return all(_same(x, y) for x, y in values)


def summarize(results: list[dict[str, Any]]) -> list[str]:
    """Return the totals over all models, as lines."""
    good = [r for r in results if "error" not in r]
    lines = [f"- {len(good)} of {len(results)} models convert."]
    if not good:
        return lines
    large = [r for r in good if r["params"] > 3e6]
    near = sum(r["half_macs"] <= 0.35 for r in large)
    times, checked = [r["seconds"] for r in good], [r["equal"] for r in good if "equal" in r]
    return [
        *lines,
        f"- Half width leaves a median of {statistics.median(r['half_macs'] for r in good):.3f} of the MACs (stem and "
        f"classifier included; 0.25 is ideal). Of the {len(large)} models with more than 3M parameters it leaves at "
        f"most 0.35 in {near} ({near / max(1, len(large)):.1%}), and "
        f"{max((r['half_macs'] for r in large), default=0):.3f} at most.",
        f"- Trace, proof and conversion take a median of {statistics.median(times):.1f} s and at most "
        f"{max(times):.1f} s of one core, and at most {max(r['gigabytes'] for r in good):.2f} GiB beyond the model.",
        f"- {sum(checked)} of the {len(checked)} models that were also run with weights agree bit for bit: widest "
        f"subnet and model, widest and random subnet and their extracted models. The other {len(good) - len(checked)} "
        "are too large to be run here in good time, and proven on the meta device alone.",
        f"- The proof had to repair {sum(bool(r['repairs']) for r in good)} traces by freezing more.",
        f"- Operators without a rule: {', '.join(sorted({o for r in good for o in r['unruled']})) or 'none'}.",
    ]


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the page: totals, then one line a model, the least slimmable first within each family."""
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        families[result.get("family", "?")].append(result)
    lines = ["# Coverage", "", "Made by `recipes/benchmarks/coverage.py` on one core.", "", *summarize(results)]
    lines += [
        "",
        "## Families",
        "",
        "| family | models | MACs at half, median | most | s, median |",
        "|---|---|---|---|---|",
    ]
    for family, members in sorted(families.items()):
        good = [r for r in members if "error" not in r]
        if good:
            halves = [r["half_macs"] for r in good]
            seconds = statistics.median(r["seconds"] for r in good)
            lines.append(
                f"| {family} | {len(good)} | {statistics.median(halves):.3f} | {max(halves):.3f} | {seconds:.1f} |"
            )
    lines += [
        "", "## Models", "",
        "Equal: run with weights, and bit for bit equal; proven: on the meta device only. What keeps a model above "
        "0.35 is listed with its share of the model's MACs.", "",
        "| family | model | params | groups | MACs at half | params at half | MACs at width 1 | params at width 1 | s "
        "| checked | obstacles |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for family, members in sorted(families.items()):
        for r in sorted(members, key=lambda r: (-r.get("half_macs", 2), r["name"])):
            if "error" in r:
                lines.append(f"| {family} | {r['name']} | | | | | | | | | {r['error'].replace('|', '/')} |")
                continue
            obstacles = [f"{reason} ({share:.2f})" for reason, share in r["obstacles"][:3] if share > 0.02]
            why = "; ".join(obstacles) if r["half_macs"] > 0.35 else ""
            check = "proven" if "equal" not in r else "equal" if r["equal"] else "DIFFERS"
            lines.append(
                f"| {family} | {r['name']} | {r['params'] / 1e6:.2f}M | {r['groups']} | {r['half_macs']:.3f} "
                f"| {r['half_params']:.3f} | {r['min_macs']:.4f} | {r['min_params']:.4f} | {r['seconds']:.1f} "
                f"| {check} | {why.replace('|', '/')} |"
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
    parser.add_argument("--equal", type=float, default=20.0, help="run models of at most this many GMACs with weights")
    parser.add_argument("--seconds", type=float, default=300, help="time for one model")
    parser.add_argument("--gigabytes", type=int, default=12, help="address space for one model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    done = {r["name"] for r in results}
    wanted = [] if args.only_table else args.models or list_names(args.smallest)
    todo = [n for n in wanted if n not in done]
    measurements = run_children(
        functools.partial(measure, equal=args.equal),
        todo,
        jobs=args.jobs,
        gigabytes=args.gigabytes,
        seconds=args.seconds,
    )
    for result in tqdm(measurements, total=len(todo), unit="model"):
        results.add(result)
    if args.table:
        files.write_text(args.table, make_table(results))
    failed = [r["name"] for r in results if "error" in r]
    print(f"{len(results) - len(failed)} of {len(results)} convert" + (f"; not: {', '.join(failed)}" if failed else ""))


if __name__ == "__main__":
    main()
