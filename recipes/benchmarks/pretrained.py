"""From a trained model to half and a quarter of its MACs: our ways and torch-pruning's, with the same training.

    python recipes/benchmarks/pretrained.py --checkpoint FILE --data-dir DIR --table docs/benchmarks.md

DIR has train.tar and test.tar (or folders) of class folders; FILE is a safetensors file of the --model, or, with
--model-kwargs, of one that `train_original.py` trained. Rows and tables are kept apart by --name. Of the training
images 10,000 are fine-tuned on and 500 others rank subnets, both drawn by the seed. A job is a method and a seed: it
finds its networks, and measures each as it was cut out (BatchNorm calibrated), reconstructed (no training), and after
training (`--trainings`), with labels alone or with the original as the teacher. "stages" continue from the trained
network of half the MACs to a quarter; "short stages" from one that was trained for one epoch.

Compute is images times MACs, as `torch.utils.flop_counter` counts them, in forwards of the original for one image: of
the search or pruning with its gradients, of reconstruction, and of training (a step is three forwards of the network,
and one of the teacher).

Results are one JSON line each; a run that is started again goes on with what it lacks. --workers run side by side, on a
GPU too; --limit ends all of them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
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
from timm_autoslim.recipes.benchmarks.lib.effort import Effort, count_effort
from timm_autoslim.recipes.benchmarks.lib.fastnas import search_fastnas
from timm_autoslim.recipes.benchmarks.lib.fitting import Loss, Pictures, fit
from timm_autoslim.recipes.benchmarks.lib.images import find_part, measure_top1, read_images
from timm_autoslim.recipes.benchmarks.lib.pretrained_tables import (
    EPOCHS,
    SHARES,
    Row,
    draw,
    make_tables,
)
from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table
from timm_autoslim.recipes.benchmarks.lib.slim_networks import (
    METHODS,
    RECONSTRUCTED,
    Network,
    Task,
    adopt,
    count_forwards,
    count_macs,
    take_share,
)

TRAINED, HELD_OUT, PARTS, RANKED = 10_000, 500, 4, 2_000
RATE, BATCH, SMOOTHING, TEMPERATURE = 1e-3, 64, 0.1, 2.0
# Starts and teachers, what matters most first; None is the mark of a job that measures without training.
TRAININGS = (("reconstructed", "original"), ("cut", "labels"), ("reconstructed", "labels"), ("cut", "original"))
# ModelOpt needs a package of its own, and is measured where it is named.
WAYS = METHODS | {"ModelOpt, fastnas": search_fastnas}
# The end of a method's name by the epochs that the network of the first share is trained for.
STAGES = {", stages": max(EPOCHS), ", short stages": min(EPOCHS)}


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
    path = args.cache / f"{name}-{count}-{args.img_size}-{seed}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(read_images(find_part(args.data_dir, name), count, seed, args.img_size), path)
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
    model: nn.Module = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
    if args.checkpoint:
        model.load_state_dict(load_file(args.checkpoint))
    return model.to(args.device).eval()


def make_task(model: nn.Module, original: nn.Module, data: Data, shares: tuple[float, ...], seed: int) -> Task:
    """Return what a way of slimming gets."""
    images, targets = data.pictures.padded[:, :, 4:-4, 4:-4], data.pictures.targets
    gradients = [(scale(x), y) for x, y in zip(*(torch.split(t[:RANKED], 100) for t in (images, targets)), strict=True)]
    held = [(scale(x), y) for x, y in zip(*(t.tensor_split(PARTS) for t in data.held_out), strict=True)]
    return Task(model, original, gradients, held, data.batches, targets, shares, seed)


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


def train(model: nn.Module, data: Data, teacher: nn.Module | None, epochs: float, seed: int) -> None:
    """Fine-tune with AdamW and a cosine, the same for all networks."""
    graphed: Any = {"capturable": True} if data.pictures.padded.is_cuda else {}
    make = functools.partial(torch.optim.AdamW, weight_decay=0.01, **graphed)
    fit(model, data.pictures, scale, make_loss(teacher), make, epochs=epochs, batch=BATCH, rate=RATE, seed=seed)


def split_stages(method: str) -> tuple[str, int]:
    """Return the way to find networks, and for how many epochs the first is trained before the next is found, or 0."""
    for suffix, epochs in STAGES.items():
        if method.endswith(suffix):
            return method.removesuffix(suffix), epochs
    return method, 0


@dataclass(frozen=True)
class Job:
    """A method and a seed, with what all its measurements need."""

    method: str
    seed: int
    args: argparse.Namespace
    data: Data
    original: nn.Module
    image: Tensor
    original_macs: int

    def reconstruct(self, network: Network) -> Effort:
        """Reconstruct a network in place."""
        assert network.supernet is not None
        batches = self.data.batches
        if self.method.startswith("slim by default"):
            batches = take_share(batches, RECONSTRUCTED / TRAINED)
        inputs = network.model, network.supernet, batches
        act = functools.partial(reconstruct, *inputs, memory_mib=4096, progress=False)
        unseen = count_forwards(*inputs)
        return count_effort(act, self.original_macs)[1] + Effort(compute=unseen / self.original_macs)

    def train(self, model: nn.Module, teacher: str, epochs: float) -> Effort:
        """Train a network in place, in the layout that is the same for all."""
        model.to(memory_format=torch.contiguous_format)
        share, start = count_macs(model, self.image) / self.original_macs, time.process_time()
        train(model, self.data, self.original if teacher == "original" else None, epochs, self.seed)
        count = round(epochs * (len(self.data.pictures.targets) // BATCH)) * BATCH
        return Effort(time.process_time() - start, count * (3 * share + (teacher == "original")))

    def first_path(self, epochs: int) -> Path:
        """The file of the network of the first share, trained for so many epochs, which stages go on from."""
        name = split_stages(self.method)[0].replace(", ", "-").replace(" ", "-")
        last = f"-{epochs}" if epochs != max(EPOCHS) else ""
        return Path(self.args.cache) / f"{name}-{self.seed}-{self.args.name}{last}.pt"

    def find(self) -> Iterator[tuple[float, nn.Module, Network, Effort]]:
        """Yield for every share its network, the model that it was cut from, and what it took to find it."""
        (name, epochs), model, effort = split_stages(self.method), self.original, Effort()
        shares: tuple[float, ...] = SHARES
        if epochs:
            model, effort = self.take_first(epochs)
            shares = SHARES[1:]
        scaled = tuple(share * self.original_macs / count_macs(model, self.image) for share in shares)
        networks = WAYS[name](make_task(model, self.original, self.data, scaled, self.seed))
        for share in shares:
            network, more = count_effort(lambda: next(networks), self.original_macs)
            effort += more + Effort(compute=network.unseen / self.original_macs)
            yield share, model, network, effort

    def take_first(self, epochs: int) -> tuple[nn.Module, Effort]:
        """Return the network of the first share, trained for so many epochs; it is made if it is not there."""
        if not self.first_path(epochs).exists():
            first = Job(split_stages(self.method)[0], *list(vars(self).values())[1:])
            _, _, network, effort = next(first.find())
            calibrate(network.model, self.data.batches)
            if network.supernet is not None:
                effort += first.reconstruct(network)
            first.keep_first(network.model, effort + first.train(network.model, "original", epochs), epochs)
        model, effort = torch.load(self.first_path(epochs), weights_only=False)  # written by this benchmark
        return model, Effort(*effort)

    def keep_first(self, model: nn.Module, effort: Effort, epochs: int) -> None:
        """Write the file of the network of the first share, trained for so many epochs."""
        model.zero_grad()
        torch.save((model.eval(), (effort.seconds, effort.compute)), self.first_path(epochs))


def list_starts(method: str, args: argparse.Namespace) -> list[str]:
    """Return the starts of a method; no supernet of ours is known that a network of ModelOpt is a subnet of."""
    return [start for start in args.starts if start == "cut" or not method.startswith("ModelOpt")]


def is_theirs(method: str) -> bool:
    """Return whether a method is one of another package."""
    return method.startswith(("torch-pruning", "ModelOpt"))


def plan(method: str, args: argparse.Namespace) -> list[tuple[float, str, str, float]]:
    """Return the trainings of a method: share, start, teacher and epochs, what matters most first."""
    usual = "cut" if is_theirs(method) else "reconstructed"
    shares = SHARES[1:] if split_stages(method)[1] else SHARES
    return [
        (share, start, teacher, count)
        for start, teacher in TRAININGS
        if start in list_starts(method, args) and teacher in args.teachers and (start == usual or args.all_starts)
        for share, count in args.trainings
        if share in shares
    ]


def measure_job(job: Job, trainings: list[tuple[float, str, str, float]]) -> Iterator[Row]:
    """Find the networks of a method, measure them, and train them."""
    starts: dict[tuple[float, str], tuple[nn.Module, Effort]] = {}
    theirs, begin = is_theirs(job.method), list_starts(job.method, job.args)
    for share, model, cut, effort in job.find():
        network = adopt(model, cut, job.image) if theirs and "reconstructed" in begin else cut
        calibrate(network.model, job.data.batches)
        macs, params = count_macs(network.model, job.image), sum(p.numel() for p in network.model.parameters())
        for start in begin:
            took = job.reconstruct(network) if start == "reconstructed" else Effort()
            starts[share, start] = copy.deepcopy(network.model), effort + took
            yield {"method": job.method, "seed": job.seed, "share": share, "start": start, "teacher": None, "epochs": 0,
                   "top1": measure_top1(network.model, job.data.test), "params": params,
                   "macs": macs / job.original_macs,
                   "seconds": (effort + took).seconds, "compute": (effort + took).compute,
                   "reconstruction_seconds": took.seconds, "reconstruction_compute": took.compute}  # fmt: skip
    for share, start, teacher, count in trainings:
        model, effort = copy.deepcopy(starts[share, start][0]), starts[share, start][1]
        effort += job.train(model, teacher, count)
        if (share, teacher) == (SHARES[0], "original") and count in EPOCHS and (start == "cut") == theirs:
            job.keep_first(model, effort, int(count))
        yield {"method": job.method, "seed": job.seed, "share": share, "start": start, "teacher": teacher,
               "epochs": count, "top1": measure_top1(model, job.data.test),
               "seconds": effort.seconds, "compute": effort.compute}  # fmt: skip


def make_job(method: str, seed: int, args: argparse.Namespace) -> Job:
    """Return a job with its images and the original."""
    data, original = load_data(args, seed), load_model(args)
    image = data.batches[0][:1]
    return Job(method, seed, args, data, original, image, count_macs(original, image))


def read_training(text: str) -> tuple[float, float]:
    """Return the share and the epochs of a training that is written as "0.25:5"."""
    share, _, count = text.partition(":")
    if float(share) not in SHARES:
        raise argparse.ArgumentTypeError(f"{text}: the share is one of {SHARES}")
    return float(share), int(count) if count.isdecimal() else float(count)


def run_job(job: tuple[str, int], args: argparse.Namespace) -> None:
    """Run one job; an error becomes a row too."""
    torch.set_num_threads(args.threads)
    results, (method, seed) = Results(args.results), job
    done = {tuple(row.get(key) for key in KEYS) for row in results if row["model"] == args.name}
    try:
        trainings = [training for training in plan(method, args) if (method, seed, *training) not in done]
        measured = [(method, seed, share, start, None, 0) for share, start, _, _ in plan(method, args)]
        if not trainings and measured and done.issuperset(measured):
            return
        for row in measure_job(make_job(method, seed, args), trainings):
            if tuple(row[key] for key in KEYS) not in done:
                results.add({"model": args.name} | row | {"device": args.device})
                print(f"{method}, {seed}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in KEYS[:2]))
    except Exception as error:
        words = f"{type(error).__name__}: {error}"[:300]
        last = "".join(traceback.format_exception(error, limit=-5))
        results.add({"model": args.name, "method": method, "seed": seed, "error": words, "traceback": last})


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


def main() -> None:
    """Measure what has no result yet, and write the table."""
    parser = make_parser(__doc__, "docs/results/pretrained.jsonl")
    staged = ("searched", "searched by outputs", "slim by default", "torch-pruning, taylor")
    stages = [name + suffix for suffix in STAGES for name in staged]
    parser.add_argument("--figure", type=Path, help="draw accuracy against compute into this file")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *stages], choices=[*WAYS, *stages])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, metavar="JSON", help="further arguments of it")
    parser.add_argument("--name", help="of the model in rows and tables, --model by default")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="weights of the trained model, a safetensors file")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--img-size", type=int, default=64, help="side of the images")
    parser.add_argument("--cache", type=Path, default=Path("runs/pretrained"), help="folder of images that were read")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, help="seconds")
    trainings = [f"{share}:{count}" for count in reversed(EPOCHS) for share in SHARES]
    parser.add_argument("--trainings", nargs="*", type=read_training, default=[*map(read_training, trainings)],
                        help=f"SHARE:EPOCHS in turn, {' '.join(trainings)} by default")  # fmt: skip
    parser.add_argument("--starts", nargs="+", default=["cut", "reconstructed"], help="of the trainings")
    parser.add_argument("--teachers", nargs="+", default=["labels", "original"], help="of the trainings")
    parser.add_argument(
        "--all-starts", action="store_true", help="train ours as they were cut out, too, and reconstruct theirs"
    )
    parser.add_argument("--toy", action="store_true", help="few images")
    args = parser.parse_args()
    args.name = args.name or args.model
    if not args.only_table:
        if not args.data_dir:
            parser.error("give --data-dir, with train.tar and test.tar of class folders")
        run_jobs(args)
    rows = Results(args.results)
    tables = make_tables(rows)
    print(tables)
    if args.table:
        put_table(args.table, "pretrained", tables)
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
