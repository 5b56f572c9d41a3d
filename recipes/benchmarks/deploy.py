"""Export slim models to ONNX and int8, and write how small and fast they are: the table in docs/benchmarks.md.

    python recipes/benchmarks/deploy.py --only-prepare                              # exports, quantises, checks
    python recipes/benchmarks/deploy.py                                             # measures the prepared networks
    python recipes/benchmarks/deploy.py --only-table --table docs/benchmarks.md     # writes the table

Each model is cut uniformly to a half of its MACs, channel by channel, and to a half and a quarter with widths that are
multiples of 16. The networks of a model, in PyTorch and in ONNX Runtime, are timed in turn, round by round, so that
other work of the machine slows all of them alike; a ratio is the median over the rounds. Weights are random: they
change neither sizes nor times. A run that is started again goes on with what is missing. Needs the extra `onnx`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from tqdm import tqdm

from timm_autoslim import Supernet, Widths, calibrate, convert, cost, create_base, export, files
from timm_autoslim.recipes.benchmarks.lib.results import Results, put_table

MODELS = ("resnet50", "mobilenetv2_100", "convnext_nano", "vit_small_patch16_224", "torchvision/mobilenet_v3_large")
# share of the MACs, and what all widths are multiples of
NETWORKS = {"base": (1.0, 1), "half": (0.5, 1), "half-of-16s": (0.5, 16), "quarter-of-16s": (0.25, 16)}
FORMS = {"torch": "PyTorch", "onnx": "ONNX Runtime", "int8": "ONNX Runtime, int8"}
FILES = {"torch": "exported/model.safetensors", "onnx": "model.onnx", "int8": "int8.onnx"}


class CalibrationImages(CalibrationDataReader):  # type: ignore[misc]
    """The images on which the ranges of a quantised model are measured, one by one."""

    def __init__(self, images: Tensor) -> None:
        self._images = iter(images.numpy())  # (N, C, H, W)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next image (1, C, H, W) under the name of the input."""
        image = next(self._images, None)
        return None if image is None else {"images": image[None]}


def prepare(name: str, folder: Path) -> None:
    """Write the networks of one model: an exported folder, model.onnx, int8.onnx and facts.json each."""
    torch.manual_seed(0)
    model = create_base(name).eval()
    config: Any = model.pretrained_cfg
    images = torch.randn(8, *config["input_size"])  # (N, C, H, W)
    for network, (share, multiple) in NETWORKS.items():
        place = folder / network
        if (place / "facts.json").exists():
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        supernet = convert(model, base=name, divisor=multiple)
        widths = choose_widths(supernet, share)
        extracted = supernet.extract(widths)
        calibrate(extracted, [images])
        export(extracted, place / "exported")
        spent = cost(supernet, widths)
        facts = {"macs": spent.macs, "params": spent.params, **_deploy(place, images)}
        files.write_text(place / "facts.json", json.dumps(facts))


def choose_widths(supernet: Supernet, share: float) -> Widths:
    """Return the widest uniform subnet within a share of the MACs, in steps of 1 % of the width, on the choices."""
    limit = share * cost(supernet).macs
    subnets = (supernet.space.uniform(percent / 100) for percent in range(100, 0, -1))
    return next(widths for widths in subnets if cost(supernet, widths).macs <= limit)


def _deploy(place: Path, images: Tensor) -> dict[str, Any]:
    """Write model.onnx and int8.onnx; return the size of each file, and how far its logits are from PyTorch's."""
    model = load(place)
    torch.onnx.export(
        model, (images[:1],), place / "model.onnx", dynamo=True, input_names=["images"], output_names=["logits"],
        external_data=False, verbose=False,
    )  # fmt: skip
    quant_pre_process(str(place / "model.onnx"), str(place / "preprocessed.onnx"), skip_symbolic_shape=True)
    quantize_static(
        str(place / "preprocessed.onnx"), str(place / "int8.onnx"), CalibrationImages(images), per_channel=True
    )
    (place / "preprocessed.onnx").unlink()
    with torch.inference_mode():
        expected = model(images[:1]).numpy()
        gaps = {form: np.abs(make_runner(place, form, images[:1])() - expected).max() for form in ("onnx", "int8")}
    return {
        "bytes": {form: (place / file).stat().st_size for form, file in FILES.items()},
        "gap": {form: float(gap / np.abs(expected).max()) for form, gap in gaps.items()},
    }


def load(place: Path) -> nn.Module:
    """Return the exported model as any user loads it, ready for export."""
    model: nn.Module = timm.create_model(f"local-dir:{place / 'exported'}", pretrained=True, exportable=True)
    return model.eval()


def make_runner(place: Path, form: str, image: Tensor) -> Callable[[], Any]:
    """Return a function without arguments that runs one form of one network on one image (1, C, H, W)."""
    if form == "torch":
        model = load(place)
        return lambda: model(image)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(place / FILES[form]), options, providers=["CPUExecutionProvider"])
    feed = {"images": image.numpy()}
    return lambda: session.run(None, feed)[0]


@torch.inference_mode()
def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Time the networks of one model in turn; return medians in ms, and medians of the ratios to the base."""
    config: Any = load(folder / "base").pretrained_cfg
    image = torch.randn(1, *config["input_size"])
    keys = [(network, form) for form in FORMS for network in NETWORKS]
    runs = {key: make_runner(folder / key[0], key[1], image) for key in keys}
    repeats = {}
    for key, run in runs.items():
        _milliseconds(run, 2)  # first calls allocate
        repeats[key] = max(1, round(20 / _milliseconds(run, 1)))  # about 20 ms for each sample
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    for _ in range(rounds):
        for key, run in runs.items():
            samples[key].append(_milliseconds(run, repeats[key]))
    result: dict[str, Any] = {"name": name, "rounds": rounds, "ms": {}, "ratio": {}}
    for network, form in keys:
        pairs = zip(samples[network, form], samples["base", form], strict=True)
        result["ms"].setdefault(network, {})[form] = statistics.median(samples[network, form])
        result["ratio"].setdefault(network, {})[form] = statistics.median(a / b for a, b in pairs)
    return result


def _milliseconds(run: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) * 1000 / repeats


def make_table(results: list[dict[str, Any]], work: Path) -> str:
    """Return the table: one row a network, sizes in MB, times in ms, and in brackets the ratio to the base."""
    columns = ["safetensors, MB", "ONNX, MB", "int8, MB", *(f"{title}, ms" for title in FORMS.values())]
    head = ["model", "MACs", "widths of", *columns, "gap", "gap, int8"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        for network, (_, multiple) in NETWORKS.items():
            facts = read_facts(name_folder(work, result["name"]) / network)
            base = read_facts(name_folder(work, result["name"]) / "base")
            sizes = [f"{facts['bytes'][f] / 1e6:.1f} ({facts['bytes'][f] / base['bytes'][f]:.2f})" for f in FORMS]
            times = [f"{result['ms'][network][f]:.1f} ({result['ratio'][network][f]:.2f})" for f in FORMS]
            gaps = [f"{facts['gap']['onnx']:.0e}", f"{facts['gap']['int8']:.2f}"]
            macs = f"{facts['macs'] / 1e6:,.0f}M ({facts['macs'] / base['macs']:.2f})"
            cells = [result["name"], macs, "16s" if multiple > 1 else "any", *sizes, *times, *gaps]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_facts(place: Path) -> dict[str, Any]:
    """Return what `prepare` wrote about one network."""
    facts: dict[str, Any] = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    return facts


def name_folder(work: Path, name: str) -> Path:
    """Return the folder of one model's networks."""
    return work / name.replace("/", "-")


def main() -> None:
    """Prepare, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/deploy"), help="folder of networks and results")
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names, or torchvision/NAME")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only-prepare", action="store_true", help="measure nothing")
    parser.add_argument("--only-table", action="store_true", help="prepare and measure nothing")
    parser.add_argument("--table", type=Path, help="write the table between its markers in this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.work / "results.jsonl")
    done = {result["name"] for result in results}
    for name in tqdm([] if args.only_table else [n for n in args.models if n not in done], unit="model"):
        prepare(name, name_folder(args.work, name))
        if not args.only_prepare:
            results.add(measure(name, name_folder(args.work, name), args.rounds))
    order = {name: i for i, name in enumerate(args.models)}
    text = make_table(sorted(results, key=lambda r: order.get(r["name"], len(order))), args.work)
    print(text)
    if args.table:
        put_table(args.table, "deploy", text)


if __name__ == "__main__":
    main()
