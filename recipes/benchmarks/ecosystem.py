"""Convert models of other packages and write what can be slimmed: docs/ecosystem.md.

    python recipes/benchmarks/ecosystem.py --table docs/ecosystem.md                      # all packages
    python recipes/benchmarks/ecosystem.py --packages ultralytics --results runs/ecosystem.jsonl
    python recipes/benchmarks/ecosystem.py --table docs/ecosystem.md --only-table

Packages that are not installed are skipped, and named. No weights are downloaded: models are built small, with random
weights. Each is converted twice, as it is built and after a forward, and both must have the same search space. The
widest subnet must give the model's outputs, and it, one of half width and a random one those of their extracted models,
bit for bit, in evaluation mode. A model that keeps more than 0.35 of its MACs at half width is converted once more, and
keeps the channels of its results alone (`keep_output=`: logits, boxes, scores), while the features that it
returns may be narrower. So are models that return nothing but features; those whose results have no such names are not.

One process for each model (forked, so that nothing is imported twice), with limits of memory and time. Results are one
JSON line a model; a run that is started again goes on with the models that have none.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from timm_autoslim import Supernet, convert, reach
from timm_autoslim.recipes.benchmarks.lib.children import describe_error, run_children
from timm_autoslim.recipes.benchmarks.lib.ecosystem import PACKAGES, Build
from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table

GOAL = 0.35  # of the MACs at half width
RESULTS = ("logits*", "pred_boxes*", "pred_logits*", "*_logits")  # names of outputs that are results
DETECTORS = {"ultralytics": ("0", "*boxes", "*scores")}  # by package; their losses read the sizes alone of other maps
FEATURES = {  # by package, how the names of classes end whose outputs are features
    "transformers": ("Model", "Backbone"),
    "monai": ("ViT",),
    "kornia": ("VisionTransformer",),
}


def find_build(name: str) -> Build:
    """Return what builds the model of a row, `PACKAGE: MODEL`."""
    package, _, model = name.partition(": ")
    return PACKAGES[package].list_models()[model]


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a model with random weights that hide none of its parts, in evaluation mode, and inputs that it takes."""
    torch.manual_seed(0)
    model, example = find_build(name)()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():  # what starts at zero counts too
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval().requires_grad_(True), example


def measure(name: str) -> dict[str, Any]:
    """Convert one model; return groups, reach and time, what is fixed and why, and whether subnets are equal."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, example = build(name)
    row: dict[str, Any] = {"name": name, "class": type(model).__name__}
    row["params"] = sum(p.numel() for p in model.parameters())
    start = time.process_time()  # of one thread, so whatever else runs does not count
    try:
        supernet = convert(model, example)
    except Exception as error:  # of any kind: the row says which
        row["error"] = describe_error(error)
    else:
        row["seconds"] = round(time.process_time() - start, 2)
        reached = reach(supernet)
        row |= {"groups": len(supernet.space), "macs": reached.widest.macs, "obstacles": reached.obstacles[:6]}
        row["half"] = round(reached.half.macs / reached.widest.macs, 4)
        row |= {"repairs": supernet.repairs, "unruled": supernet.unruled, "equal": check_equal(supernet, example)}
        space = describe_space(supernet)
        del supernet
    if row.get("half", 0) > GOAL:
        row |= measure_features(name)
    other, example = build(name)
    with torch.no_grad():
        call(other, example)
    try:
        after = convert(other, example)
        row["same"] = "error" not in row and describe_space(after) == space
        row["half_after"] = round((costs := reach(after)).half.macs / costs.widest.macs, 4)
    except Exception as error:
        row["error_after"] = describe_error(error)
    return row


def measure_features(name: str) -> dict[str, Any]:
    """Convert one model so that it keeps the channels of its results alone; return its reach and what it keeps.

    It returns nothing if the model's outputs are results, but do not say so by their names.
    """
    model, example = build(name)
    with torch.no_grad():
        outputs = call(model, example)
    package = name.partition(": ")[0]
    names = list(outputs) if isinstance(outputs, Mapping) else []  # as those of transformers are
    kept = [glob for glob in RESULTS if fnmatch.filter(names, glob)] or list(DETECTORS.get(package, ()))
    if not kept and not type(model).__name__.endswith(FEATURES.get(package, ())):
        return {}
    row: dict[str, Any] = {"results": kept}
    try:
        supernet = convert(model, example, keep_output=kept or False)
    except Exception as error:
        return row | {"error_of_results": describe_error(error)}
    reached = reach(supernet)
    row["half_of_results"] = round(reached.half.macs / reached.widest.macs, 4)
    row["equal_of_results"] = check_equal(supernet, example)
    return row


def describe_space(supernet: Supernet) -> list[tuple[str, int]]:
    """Return the groups and their widest widths."""
    return list(supernet.space.max().to_dict().items())


@torch.no_grad()
def check_equal(supernet: Supernet, example: Any) -> str:
    """Return which subnets differ from the model, or from their extracted models; empty if none does."""
    space = supernet.space
    first, again = (run(supernet.model, example) for _ in range(2))
    if not same(first, again):
        return "the model itself gives other outputs each time"
    faults = [] if same(first, run(supernet, example)) else ["widest"]
    subnets = {
        "widest": space.max(),
        "half": space.uniform(0.5),
        "random": space.sample(torch.Generator().manual_seed(0)),
    }
    for kind, widths in subnets.items():
        subnet = run(lambda *args, widths=widths, **kwargs: supernet(*args, widths=widths, **kwargs), example)
        if not same(subnet, run(supernet.extract(widths), example)):
            faults.append(f"{kind} and its extracted model")
    return ", ".join(faults)


def call(model: Any, example: Any) -> Any:
    """Call a model with inputs as `convert` takes them: a tuple or a dict for several."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def run(model: Any, example: Any) -> list[torch.Tensor]:
    """Return the tensors that a model gives, with the same random numbers each time."""
    torch.manual_seed(0)
    outputs = call(model, example)
    values = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def same(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether there are any tensors, and the others are the same, bit for bit."""
    shapes = [tensor.shape for tensor in tensors] == [tensor.shape for tensor in others]
    close = (torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(tensors, others, strict=False))
    return bool(tensors) and shapes and all(close)


# ------------------------------------------------------------------------------------------------ the page


def summarize(rows: list[dict[str, Any]]) -> list[str]:
    """Return the totals, as lines."""
    good = [row for row in rows if "error" not in row and "error_after" not in row]
    if not good:
        return ["- No model converts."]
    alike, halves = [row for row in good if row["same"]], [row["half"] for row in good]
    near, wrong = [half for half in halves if half <= GOAL], [row for row in good if row["equal"]]
    free = [row.get("half_of_results", row["half"]) for row in good]
    free_near = [half for half in free if half <= GOAL]
    random = sum(row["equal"].startswith("the model itself") for row in wrong)
    return [
        f"- {len(good)} of {len(rows)} models convert as built and after a forward ({len(good) / len(rows):.0%}), "
        f"{len(alike)} ({len(alike) / len(rows):.0%}) with the same search space both times.",
        f"- Half width leaves a median of {statistics.median(halves):.3f} of the MACs, and at most {GOAL} in "
        f"{len(near)} of {len(good)} ({len(near) / len(good):.0%}) where all outputs keep their channels; in "
        f"{len(free_near)} ({len(free_near) / len(good):.0%}) where returned features may be narrower.",
        f"- Subnets give what their extracted models give, bit for bit, in {len(good) - len(wrong)}; "
        f"{random} give other outputs each time they are called, and {len(wrong) - random} differ.",
        f"- Conversion takes a median of {statistics.median(row['seconds'] for row in good):.1f} s of one core, "
        f"at most {max(row['seconds'] for row in good):.1f} s.",
    ]


def make_table(rows: list[dict[str, Any]], missing: list[str]) -> str:
    """Return the totals, the packages, and one line a model, the least slimmable first in each package."""
    lines = [
        *summarize(rows),
        "",
        "| package | version | models | convert | MACs at half, median |",
        "|---|---|---|---|---|",
    ]
    packages = Counter(row["name"].partition(": ")[0] for row in rows)
    for package in packages:
        of_package = [row for row in rows if row["name"].startswith(f"{package}: ")]
        good = [row for row in of_package if "error" not in row and "error_after" not in row]
        half = f"{statistics.median(row['half'] for row in good):.3f}" if good else ""
        version = ", ".join(sorted({row["version"] for row in of_package}))
        lines.append(f"| {package} | {version} | {len(of_package)} | {len(good)} | {half} |")
    lines += [f"| {package} | not installed | | | |" for package in missing if package not in packages]
    lines += [
        "",
        "| model | params | groups | MACs at half | features free | s | checked | what holds it, or why it does not "
        "convert |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for package in packages:
        of_package = [row for row in rows if row["name"].startswith(f"{package}: ")]
        lines += [make_line(row) for row in sorted(of_package, key=lambda row: (-row.get("half", 2), row["name"]))]
    return "\n".join(lines)


def make_line(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    params = f"{row['params'] / 1e6:.1f}M" if "params" in row else ""
    if "error" in row:
        text = row["error"].replace("|", "/").replace("\n", " ")
        return f"| {row['name']} | {params} | | | | | | {text} |"
    texts = [f"{reason} ({share:.2f})" for reason, share in row["obstacles"][:3] if share > 0.02]
    notes = texts if row["half"] > GOAL else []
    if "error_after" in row:
        notes = [f"after a forward: {row['error_after']}", *notes]
    elif not row["same"]:
        notes = [f"another search space after a forward ({row['half_after']:.3f})", *notes]
    text = "; ".join(notes).replace("|", "/").replace("\n", " ")
    check = row["equal"] or row.get("equal_of_results") or "equal"
    free = f"{row['half_of_results']:.3f}" if "half_of_results" in row else ""
    return (
        f"| {row['name']} | {params} | {row['groups']} | {row['half']:.3f} | {free} | {row['seconds']:.1f} | {check} | "
        f"{text} |"
    )


def main() -> None:
    """Convert what has no result yet, and write the table."""
    parser = make_parser(__doc__, "docs/results/ecosystem.jsonl")
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=list(PACKAGES), help="of these alone")
    parser.add_argument("--models", nargs="+", default=(), metavar="NAME", help="only these rows, as `PACKAGE: MODEL`")
    parser.add_argument("--seconds", type=float, default=240, help="time for one model")
    parser.add_argument("--gigabytes", type=int, default=10, help="address space for one model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    missing = [name for name in args.packages if not PACKAGES[name].is_installed()]
    if missing:
        print(f"not installed, and skipped: {', '.join(missing)}")
    if not args.only_table:
        sweep(results, args, missing)
    table = make_table(results, missing)
    print("\n".join(summarize(results)))
    if args.table:
        put_table(args.table, "ecosystem", table)


def sweep(results: Results, args: argparse.Namespace, missing: list[str]) -> None:
    """Measure the models of the packages that have no row yet."""
    done = {row["name"] for row in results}
    names = [f"{p}: {m}" for p in args.packages if p not in missing for m in PACKAGES[p].list_models()]
    todo = [name for name in names if name not in done and (not args.models or name in args.models)]
    rows = run_children(measure, todo, jobs=1, gigabytes=args.gigabytes, seconds=args.seconds)
    for row in tqdm(rows, total=len(todo), unit="model"):
        version = importlib.metadata.version(row["name"].partition(": ")[0])
        results.add({**row, "version": version})


if __name__ == "__main__":
    main()
