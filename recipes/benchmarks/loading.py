"""How long an exported model takes to load, beside its base: python recipes/benchmarks/loading.py runs/loading

Each base is narrowed to half its widths and exported. Then four things are timed in turn, `--rounds` times over: the
base's construction with random weights, the folder's with random weights, the base's with weights from a file, and the
folder's with its weights. The table has medians, in milliseconds of this process's CPU time on one thread. The folders
and the finished rows stay in the output folder, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from timm_autoslim.recipes.benchmarks.lib.models import export_half
from timm_autoslim.recipes.benchmarks.lib.results import Results

MODELS = (
    *("resnet50", "mobilenetv3_small_050", "efficientnet_b0", "convnext_tiny", "vit_small_patch16_224"),
    *("swin_tiny_patch4_window7_224", "hrnet_w18_small", "nasnetalarge", "torchvision/resnet50"),
    "torchvision/mobilenet_v3_large",
)
HEAD = ("| base | tensors | base | folder | over | ratio | base with weights | folder with weights | over | ratio |\n"
        "|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.output / "results.jsonl")
    done = {row["name"] for row in results}
    for name in tqdm([name for name in args.models if name not in done], unit="model"):
        results.add({"name": name, **measure(name, args.output / name.replace("/", "_"), args.rounds)})
    print(HEAD)
    for row in results:
        empty, full = row["folder"] - row["base"], row["folder_weights"] - row["base_weights"]
        print(
            f"| {row['name']} | {row['tensors']} | {row['base']:.0f} | {row['folder']:.0f} | {empty:+.0f} | "
            f"{row['folder'] / row['base']:.2f} | {row['base_weights']:.0f} | {row['folder_weights']:.0f} | "
            f"{full:+.0f} | {row['folder_weights'] / row['base_weights']:.2f} |"
        )


def measure(name: str, folder: Path, rounds: int) -> dict[str, float]:
    """Time one model; return milliseconds by what was timed, and the number of its tensors."""
    model = export_half(name, folder)
    weights = folder.with_suffix(".base.safetensors")
    save_file(model.state_dict(), weights)

    builder = name.partition("torchvision/")[2]

    def create() -> nn.Module:
        base: nn.Module = torchvision.models.get_model(builder) if builder else timm.create_model(name)
        return base

    def create_with_weights() -> nn.Module:
        if not builder:
            base: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(weights)})
            return base
        base = create()
        base.load_state_dict(load_file(weights))
        return base

    functions: dict[str, Callable[[], object]] = {
        "base": create,
        "folder": lambda: timm.create_model(f"local-dir:{folder}"),
        "base_weights": create_with_weights,
        "folder_weights": lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
    }
    milliseconds: dict[str, list[float]] = {key: [] for key in functions}
    for turn in range(rounds + 1):
        for key, function in functions.items():
            gc.collect()  # else the garbage of earlier calls is collected during one of the calls
            start = time.process_time()
            loaded = function()
            seconds = time.process_time() - start
            if turn:  # the first turn fills caches
                milliseconds[key].append(seconds * 1000)
            del loaded
    weights.unlink()
    medians = {key: statistics.median(times) for key, times in milliseconds.items()}
    return {**medians, "tensors": len(model.state_dict())}


if __name__ == "__main__":
    main()
