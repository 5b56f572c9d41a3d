"""Call the public methods of every class of timm and torchvision on a slim model, and compare with its base.

    python recipes/benchmarks/methods.py --table docs/limits.md
    python recipes/benchmarks/methods.py --models mobileone_s0 fastvit_t8 --results runs/methods.jsonl

A small member of each class, and some further models, get random weights and are cut to half of their widths. Each
public method of the model, and of the first module of each class in it, is called on copies of three: the base, the
extracted model, and the same as loaded from its exported folder. They must do the same: return the same kinds of
things, keep their outputs where the base keeps them (`fuse`, `reparameterize`), and take images afterwards. Where the
base raises, anything goes.

Results are one JSON line a model; a run that is started again goes on with the models that have none.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_autoslim import calibrate, convert, create_base, create_meta_base, export
from timm_autoslim.recipes.benchmarks.lib.members import MEMBERS
from timm_autoslim.recipes.benchmarks.lib.methods import compare, list_calls, run_call
from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table

# Further models, with blocks that the member of their class lacks.
MODELS = MEMBERS | {
    name: (64, dict[str, Any]())
    for name in ("mobileone_s0", "repvgg_a0", "ghostnetv3_050", "fastvit_mci0", "resnest14d", "eca_resnext26ts")
}
MODELS["levit_conv_128s"] = (224, {})


def randomise(model: nn.Module, images: Tensor) -> nn.Module:
    """Move weights away from what constructors set, so that each of them counts, and measure the statistics."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    calibrate(model, [images])
    return model.eval()


def build(name: str) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """Return a small model with random weights, the arguments that it was built with, and images that it takes."""
    torch.manual_seed(0)
    side, arguments = MODELS[name]
    arguments = {"num_classes": 10, **{k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}}
    if "img_size" in inspect.signature(type(create_meta_base(name, **arguments)).__init__).parameters:
        arguments["img_size"] = side
    images = torch.randn(2, 3, side, side)
    return randomise(create_base(name, **arguments), images), arguments, images


def narrow(name: str, model: nn.Module, arguments: dict[str, Any], images: Tensor) -> tuple[nn.Module, nn.Module]:
    """Return the model at half of its widths, and the same model as its exported folder is loaded."""
    supernet = convert(model, images[:1], base=name, base_args=arguments)
    slim = supernet.extract(supernet.space.uniform(0.5))
    calibrate(slim, [images])
    with tempfile.TemporaryDirectory() as folder:
        reloaded: nn.Module = timm.create_model(f"local-dir:{export(slim, f'{folder}/slim')}", pretrained=True)
    return slim.eval(), reloaded.eval()


def measure(name: str) -> dict[str, Any]:
    """Call the methods of one model; return how many there are, and what is wrong."""
    start = time.perf_counter()
    model, arguments, images = build(name)
    row: dict[str, Any] = {"name": name, "family": type(model).__name__}
    slim, reloaded = narrow(name, model, arguments, images)
    raising, faults = dict[str, str](), dict[str, str]()
    calls = list(list_calls(model))
    for call in tqdm(calls, desc=name, unit="call", leave=False):
        base = run_call(model, call, images)
        if base.error:
            raising[str(call)] = base.error
            continue
        for kind, other in (("extracted", slim), ("reloaded", reloaded)):
            fault = compare(base, run_call(other, call, images))
            if fault:
                faults[f"{kind}: {call}"] = fault
    methods = len({(call.path, call.method) for call in calls})
    seconds = round(time.perf_counter() - start, 1)
    return {**row, "methods": methods, "calls": len(calls), "raising": raising, "faults": faults, "seconds": seconds}


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the totals, and what is wrong."""
    calls, methods = sum(row["calls"] for row in results), sum(row["methods"] for row in results)
    raising, wrong = sum(len(row["raising"]) for row in results), sum(len(row["faults"]) for row in results)
    lines = [
        "| models | methods | calls | the base raises | a slim model differs |",
        "|---|---|---|---|---|",
        f"| {len(results)} | {methods:,} | {calls:,} | {raising:,} | {wrong:,} |",
    ]
    for row in results:
        for call, fault in row["faults"].items():
            lines.append(f"| {row['name']} | {call} | | | {fault.replace('|', '/')} |")
    return "\n".join(lines)


def main() -> None:
    """Call what has no result yet, and write the table."""
    parser = make_parser(__doc__, "docs/results/methods.jsonl")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", default=MODELS, help="of the members")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    done = {row["name"] for row in results}
    names = [] if args.only_table else [name for name in args.models if name not in done]
    for name in tqdm(names, unit="model"):
        results.add(measure(name))
    print(make_table(results))
    if args.table:
        put_table(args.table, "methods", make_table(results))


if __name__ == "__main__":
    main()
