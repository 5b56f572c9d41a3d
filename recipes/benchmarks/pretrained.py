"""From a trained model to half and a quarter of its MACs: our ways and torch-pruning's, with the same training.

    python recipes/benchmarks/pretrained.py --checkpoint FILE --data-dir DIR --table docs/benchmarks.md

DIR has train.tar and test.tar (or folders) of class folders; FILE is a safetensors file of the --model. Of the training
images 10,000 are fine-tuned on and 500 others rank subnets, both drawn by the seed. A job is a method and a seed: it
finds its networks, and measures each as it was cut out (BatchNorm calibrated), reconstructed (no training; ours alone),
and after training for 1 and for 5 `--epochs`, with labels alone or with the original as the teacher. "stages" continue
from the trained network of half the MACs to a quarter.

Results are one JSON line each; a run that is started again goes on with what it lacks. --workers run side by side, on a
GPU too; --limit ends all of them.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim import calibrate, reconstruct, soft_cross_entropy
from timm_autoslim.recipes.benchmarks.lib.fitting import Loss, Pictures, fit
from timm_autoslim.recipes.benchmarks.lib.images import find_part, measure_top1, read_images
from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table
from timm_autoslim.recipes.benchmarks.lib.slim_networks import METHODS, Network, Task, count_macs

Row = dict[str, Any]

SHARES = (0.5, 0.25)
TRAINED, HELD_OUT, PARTS, RANKED = 10_000, 500, 4, 2_000
EPOCHS, RATE, BATCH, SMOOTHING, TEMPERATURE = (1, 5), 1e-3, 64, 0.1, 2.0
# Starts and teachers, what matters most first; None is the mark of a job that measures without training.
TRAININGS = (("reconstructed", "original"), ("cut", "labels"), ("reconstructed", "labels"), ("cut", "original"))
SKIPPED = {
    ("importance", "labels"),
    ("isomorphic", "labels"),
    ("uniform", "labels"),
}  # of the reconstructed ones: the teacher's row is enough


def scale(images: Tensor) -> Tensor:
    """Return bytes as numbers in -1 to 1."""
    return images.float() / 127.5 - 1


@dataclass(frozen=True)
class Data:
    """Images of one seed, as bytes (N, 3, H, W), on the device.

    Attributes:
        pictures: for training.
        held_out: images and classes that rank subnets.
        test: images in -1 to 1 (M, 3, H, W), and classes.
        batches: for BatchNorm's statistics and reconstruction, in -1 to 1.
    """

    pictures: Pictures
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batches: list[Tensor]


def read_part(args: argparse.Namespace, name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images and classes; those that were read once lie in the cache."""
    path = args.cache / f"{name}-{count}-{args.size}-{seed}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(read_images(find_part(args.data_dir, name), count, seed, args.size), path)
    images, targets = torch.load(path)
    return images, targets


def load_data(args: argparse.Namespace, seed: int) -> Data:
    """Return the images of one seed."""
    trained, held = (60, 20) if args.toy else (TRAINED, HELD_OUT)
    images, targets = (t.to(args.device) for t in read_part(args, "train", trained + held, seed))
    test, classes = (t.to(args.device) for t in read_part(args, "test", 60 if args.toy else 10_000, 0))
    batches = torch.split(scale(images[:trained]), 250)
    return Data(
        Pictures(images[:trained], targets[:trained], 127),
        (images[trained:], targets[trained:]),
        (scale(test), classes),
        list(batches),
    )


def load_model(args: argparse.Namespace) -> nn.Module:
    """Return the trained model, in evaluation mode."""
    model: nn.Module = timm.create_model(args.model, num_classes=args.num_classes)
    if args.checkpoint:
        model.load_state_dict(load_file(args.checkpoint))
    return model.to(args.device).eval()


def make_task(model: nn.Module, data: Data, shares: tuple[float, ...], seed: int) -> Task:
    """Return what a way of slimming gets."""
    images, targets = data.pictures.padded[:, :, 4:-4, 4:-4], data.pictures.targets
    gradients = [(scale(x), y) for x, y in zip(*(torch.split(t[:RANKED], 100) for t in (images, targets)), strict=True)]
    held = [(scale(x), y) for x, y in zip(*(t.tensor_split(PARTS) for t in data.held_out), strict=True)]
    return Task(model, gradients, held, data.batches, shares, seed)


def make_loss(teacher: nn.Module | None) -> Loss:
    """Return the cross-entropy with smoothed labels; with a teacher the mean of it and of their distance."""

    def measure(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        outputs = model(images)
        loss = F.cross_entropy(outputs, targets, label_smoothing=SMOOTHING)
        if teacher is None:
            return loss
        with torch.no_grad():
            taught = teacher(images)
        return (loss + soft_cross_entropy(outputs, taught, TEMPERATURE)) / 2

    return measure


def train(model: nn.Module, data: Data, teacher: nn.Module | None, epochs: int, seed: int) -> None:
    """Fine-tune with AdamW and a cosine, the same for all networks."""
    graphed: Any = {"capturable": True} if data.pictures.padded.is_cuda else {}
    make = functools.partial(torch.optim.AdamW, weight_decay=0.01, **graphed)
    fit(model, data.pictures, scale, make_loss(teacher), make, epochs=epochs, batch=BATCH, rate=RATE, seed=seed)


def measure_job(method: str, seed: int, args: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[Row]:
    """Find the networks of a method, and measure and train them; what is done is left out."""
    name = method.removesuffix(", stages")
    data, original = load_data(args, seed), load_model(args)
    image, epochs = data.batches[0][:1], args.epochs
    whole, work = count_macs(original, image), 0
    networks: list[tuple[float, Network]] = []
    if method.endswith(", stages"):
        first = next(METHODS[name](make_task(original, data, SHARES[:1], seed)))
        calibrate(first.model, data.batches)
        if first.supernet is not None:
            reconstruct(first.model, first.supernet, data.batches, memory_mib=4096)
        train(first.model, data, original, max(EPOCHS), seed)
        share = SHARES[1] * whole / count_macs(first.model, image)
        second = next(METHODS[name](make_task(first.model, data, (share,), seed)))
        networks, work = [(SHARES[1], second)], first.work
    else:
        found = METHODS[name](make_task(original, data, SHARES, seed))
        networks = list(zip(SHARES, found, strict=True))
    starts: dict[tuple[float, str], dict[str, Tensor]] = {}
    for share, network in networks:
        common = {"method": method, "seed": seed, "share": share, "macs": count_macs(network.model, image) / whole,
                  "params": sum(p.numel() for p in network.model.parameters()), "seconds": network.seconds,
                  "work": (network.work + work) / whole}  # fmt: skip
        calibrate(network.model, data.batches)
        for start in ("cut", "reconstructed"):
            began = time.process_time()
            if start == "reconstructed":
                if network.supernet is None:
                    continue
                reconstruct(network.model, network.supernet, data.batches, memory_mib=4096)
            took = time.process_time() - began
            starts[share, start] = {key: tensor.clone() for key, tensor in network.model.state_dict().items()}
            yield common | {"start": start, "teacher": None, "epochs": 0, "reconstruction_seconds": took,
                            "top1": measure_top1(network.model, data.test)}  # fmt: skip
    for start, teacher in TRAININGS:
        for share, network in networks if start in args.starts and teacher in args.teachers else ():
            if (share, start) not in starts or (start == "reconstructed" and (method, teacher) in SKIPPED):
                continue
            for count in reversed(epochs):
                if (method, seed, share, start, teacher, count) in done:
                    continue
                network.model.load_state_dict(starts[share, start])
                began = time.process_time()
                train(network.model, data, original if teacher == "original" else None, count, seed)
                yield {"method": method, "seed": seed, "share": share, "start": start, "teacher": teacher,
                       "epochs": count, "training_seconds": time.process_time() - began,
                       "top1": measure_top1(network.model, data.test)}  # fmt: skip


def run_job(job: tuple[str, int], args: argparse.Namespace) -> None:
    """Run one job; an error becomes a row too."""
    torch.set_num_threads(args.threads)
    results, (method, seed) = Results(args.results), job
    done = {tuple(row.get(key) for key in KEYS) for row in results}
    try:
        for row in measure_job(method, seed, args, done):
            if tuple(row[key] for key in KEYS) not in done:
                results.add(row | {"device": args.device})
                print(f"{method}, {seed}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in KEYS[:2]))
    except Exception as error:
        results.add({"method": method, "seed": seed, "error": f"{type(error).__name__}: {error}"[:300],
                     "traceback": "".join(traceback.format_exception(error, limit=-5))})  # fmt: skip


def run_jobs(args: argparse.Namespace) -> None:
    """Run all jobs side by side, until they or the time end.

    Raises:
        BrokenProcessPool: a worker was killed, for want of memory perhaps.
    """
    start, jobs = time.monotonic(), [(method, seed) for method in args.methods for seed in args.seeds]
    names = [("train", seed) for seed in args.seeds] + [("test", 0)]
    sizes = {"train": 80 if args.toy else TRAINED + HELD_OUT, "test": 60 if args.toy else 10_000}
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        for name, seed in names:  # images first, once each
            pool.submit(read_part, args, name, sizes[name], seed).result()
        futures = [pool.submit(run_job, job, args) for job in jobs]
        left = None if args.limit is None else max(0.0, args.limit - (time.monotonic() - start))
        done, others = wait(futures, left, FIRST_EXCEPTION)
        if others:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
    for future in done:
        future.result()


KEYS = ("method", "seed", "share", "start", "teacher", "epochs")


def make_table(rows: list[Row]) -> str:
    """Return a line for each method, start and teacher, with means over the seeds; columns that were measured."""
    rows = [row for row in rows if "top1" in row]
    counts = sorted({row["epochs"] for row in rows})
    cells: dict[tuple[str, str, str], dict[tuple[float, int], list[float]]] = {}
    for row in rows:
        trained = {r["teacher"] for r in rows if (r["method"], r["start"]) == (row["method"], row["start"])} - {None}
        for teacher in [row["teacher"]] if row["teacher"] else sorted(trained) or ["nothing"]:
            values = cells.setdefault((row["method"], row["start"], teacher), {})
            values.setdefault((row["share"], row["epochs"]), []).append(row["top1"])
    columns = [(share, count) for share in SHARES for count in counts]
    titles = [f"{share:.0%}, {f'{count} epochs' if count else 'no training'}" for share, count in columns]
    lines = [f"| method | start | trained with | {' | '.join(titles)} |", "|---" * (3 + len(columns)) + "|"]
    for names, values in cells.items():
        lines.append(f"| {' | '.join((*names, *(_show(values.get(column, [])) for column in columns)))} |")
    return "\n".join(lines)


def _show(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    """Measure what has no result yet, and write the table."""
    parser = make_parser(__doc__, "docs/results/pretrained.jsonl")
    stages = ["searched, stages", "torch-pruning, taylor, stages"]
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *stages], choices=[*METHODS, *stages])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="weights of the trained model, a safetensors file")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--cache", type=Path, default=Path("runs/pretrained"), help="folder of images that were read")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, help="seconds")
    parser.add_argument("--epochs", nargs="*", type=int, default=list(EPOCHS), help="trainings; none to train nothing")
    parser.add_argument("--starts", nargs="+", default=["cut", "reconstructed"], help="of the trainings")
    parser.add_argument("--teachers", nargs="+", default=["labels", "original"], help="of the trainings")
    parser.add_argument("--toy", action="store_true", help="few images")
    args = parser.parse_args()
    if not args.only_table:
        if not args.data_dir:
            parser.error("give --data-dir, with train.tar and test.tar of class folders")
        run_jobs(args)
    table = make_table(Results(args.results))
    print(table)
    if args.table:
        put_table(args.table, "pretrained", table)


if __name__ == "__main__":
    main()
