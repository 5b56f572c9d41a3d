"""Accuracy of slim models without training: cut out and calibrated, and reconstructed; a table in docs/benchmarks.md.

    python recipes/benchmarks/reconstruction.py --table docs/benchmarks.md                   # digits: 45 s a model
    python recipes/benchmarks/reconstruction.py --cases lite0 --checkpoint FILE --data-dir DIR    # your own

Small models of many kinds are trained on scikit-learn's digits first, for a few epochs. The case "lite0" takes
tf_efficientnet_lite0 with the weights in `--checkpoint`, on the images of `--data-dir` (train.tar and test.tar, or
folders, of class folders) at `--size` pixels. Each model is cut uniformly to shares of its MACs, with channels in both
`--orders`; three draws of images.

Results are one JSON line each; a run that is started again goes on with what it lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_autoslim import calibrate, convert, cost, reconstruct, uniform_at
from timm_autoslim.recipes.benchmarks.lib.images import Images, find_part, load_digits, measure_top1, read_images
from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table

DIGITS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=96, num_heads=3, num_classes=10
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=32, depths=(1, 1, 2, 1),
        num_heads=(2, 2, 4, 4), num_classes=10,
    ),
    "mixer": lambda: timm.models.mlp_mixer.MlpMixer(
        img_size=32, patch_size=8, embed_dim=64, num_blocks=3, num_classes=10
    ),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 2, 1), dims=(32, 48, 64, 96)),
    "resnet": lambda: timm.create_model("resnet10t", num_classes=10, channels=(16, 32, 64, 64), stem_width=8),
    "regnet": lambda: timm.create_model("regnetx_002", num_classes=10),
    "densenet": lambda: timm.create_model("densenet121", block_config=(2, 2, 2, 2), growth_rate=16, num_classes=10),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "nfnet": lambda: timm.create_model("test_nfnet", num_classes=10),
    "torchvision's vit": lambda: torchvision.models.VisionTransformer(32, 8, 3, 3, 96, 192, num_classes=10),
}  # fmt: skip


def split_digits(seed: int) -> tuple[Images, Images]:
    """Return training and test images of the digits."""
    images, targets = load_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, targets = images[order], targets[order]
    return (images[:1200], targets[:1200]), (images[1200:], targets[1200:])


def train(model: nn.Module, images: Images, epochs: int, seed: int) -> None:
    """Train with AdamW and one cycle of the learning rate."""
    inputs, targets = images
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    steps = -(-len(inputs) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(inputs), generator=generator), 64):
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def read_scaled(path: Path, size: int, count: int, seed: int) -> Images:
    """Return images (N, 3, size, size), in -1 to 1, and classes (N,) of class folders, or of one .tar file of them."""
    pixels, targets = read_images(path, count, seed, size)
    return pixels.float() / 127.5 - 1, targets


def measure(case: str, seed: int, orders: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each order of channels and share of the MACs."""
    torch.manual_seed(seed)
    if case == "lite0":
        model = timm.create_model("tf_efficientnet_lite0", num_classes=10)
        model.load_state_dict(load_file(args.checkpoint))
        training = read_scaled(find_part(args.data_dir, "train"), args.size, 2000, seed)
        testing = read_scaled(find_part(args.data_dir, "test"), args.size, 10000, 0)
    else:
        model, (training, testing) = DIGITS[case](), split_digits(seed)
        train(model, training, 12, seed)
    original, inputs = measure_top1(model, testing), training[0]
    rows = []
    for order in orders:
        batches = torch.split(inputs, 250)
        supernet = convert(model.eval(), inputs[:2], order=order, batches=batches).eval()
        for share in (0.5, 0.25):
            slim = supernet.extract(uniform_at(supernet, "macs", share * cost(supernet).macs))
            calibrate(slim, batches)
            raw, start = measure_top1(slim, testing), time.perf_counter()
            report = reconstruct(slim, supernet, batches)
            seconds = time.perf_counter() - start
            left: dict[str, int] = {}
            for layer in report.layers:
                if layer.reason:
                    left[layer.reason] = left.get(layer.reason, 0) + 1
            rows.append({"case": case, "seed": seed, "order": order, "share": share, "original": original, "raw": raw,
                         "reconstructed": measure_top1(slim, testing), "seconds": seconds, "images": report.images,
                         "layers": len(report.layers), "left": left})  # fmt: skip
    return rows


def make_table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each model, share and order, with means over the seeds."""
    lines = [
        "| model | seeds | original | MACs | order | cut out | reconstructed | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (-row["share"], row["order"])):
        cells.setdefault((row["case"], row["share"], row["order"]), []).append(row)
    for case in dict.fromkeys(row["case"] for row in rows):
        for (_, share, order), members in ((key, value) for key, value in cells.items() if key[0] == case):
            means = {
                key: sum(row[key] for row in members) / len(members)
                for key in ("original", "raw", "reconstructed", "seconds")
            }
            lines.append(
                f"| {case} | {len(members)} | {means['original']:.1f} | {share:.0%} | {order} | {means['raw']:.1f} "
                f"| {means['reconstructed']:.1f} | {means['seconds']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure what has no result yet, and write the table."""
    parser = make_parser(__doc__, "docs/results/reconstruction.jsonl")
    parser.add_argument("--cases", nargs="+", choices=(*DIGITS, "lite0"), default=list(DIGITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--orders", nargs="+", default=["l1", "reconstruction"])
    parser.add_argument("--checkpoint", type=Path, help="weights of the case lite0")
    parser.add_argument("--data-dir", type=Path, help="images of the case lite0")
    parser.add_argument("--size", type=int, default=64, help="side of the images of the case lite0")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if "lite0" in args.cases and not args.only_table and not (args.checkpoint and args.data_dir):
        parser.error("the case lite0 needs --checkpoint and --data-dir")
    torch.set_num_threads(args.threads)
    results = Results(args.results)
    done = {(row["case"], row["seed"], row["order"]) for row in results}
    jobs = {
        (case, seed): [order for order in args.orders if (case, seed, order) not in done]
        for seed in args.seeds
        for case in args.cases
    }
    with contextlib.closing(tqdm([] if args.only_table else [job for job in jobs if jobs[job]], unit="model")) as bar:
        for case, seed in bar:
            bar.set_postfix_str(f"{case}, seed {seed}")
            for row in measure(case, seed, jobs[case, seed], args):
                results.add(row)
    print(make_table(results))
    if args.table:
        put_table(args.table, "reconstruction", make_table(results))


if __name__ == "__main__":
    main()
