"""Compare ways to search widths on CIFAR-10: one supernet, the same retraining for all, several seeds.

    python recipes/benchmarks/search.py --data-dir DIR --output runs/bench --docs docs/benchmarks.md

DIR holds CIFAR-10 as train.tar and test.tar (or folders) of class folders. For each model a supernet is trained by the
sandwich rule; every method then chooses one network for each budget, scored on the same held-out training images; every
network is fine-tuned from the supernet's weights in the same way, with several seeds, and tested once. OUTPUT/MODEL
holds all results, each in a file of its own: the same command goes on where it was stopped, and several processes may
work on different --models, or on different --methods or --seeds of a model whose supernet is trained. The table is
printed, and with --docs written between the markers of a page.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_autoslim import Found, HeldOut, SearchResult, Supernet, baseline, calibrate, cost, search
from timm_autoslim.recipes.benchmarks.lib.results import put_table
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.lib.images import open_images
from timm_autoslim.recipes.lib.loaders import load_batches
from timm_autoslim.recipes.lib.models import make_supernet
from timm_autoslim.recipes.lib.processes import make_accelerator
from timm_autoslim.recipes.lib.resume import find_start
from timm_autoslim.recipes.lib.run_folder import SUPERNET, read_weights, write_json, write_weights
from timm_autoslim.recipes.lib.sandwich import Sandwich
from timm_autoslim.recipes.lib.scores import SavedScores
from timm_autoslim.recipes.lib.shell import run_command
from timm_autoslim.recipes.lib.splits import split_training
from timm_autoslim.recipes.lib.trainer import Backward, Trainer
from timm_autoslim.recipes.lib.training import prepare

BUDGETS = {"macs": ["60%", "40%", "25%"]}
SHARED = {
    "num_classes": 10, "img_size": 32, "mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262], "crop_pct": 1.0,
    "min_width": 0.25, "limit_train": 14000, "held_out": 2000, "batch_size": 128, "weight_decay": 5e-4,
    "smoothing": 0.0, "channels_last": True, "warmup_epochs": 1, "resume": True,
}  # fmt: skip
TRAINING = {"epochs": 40, "lr": 0.1}
RETRAINING = {"epochs": 6, "lr": 0.05}
MODELS: dict[str, dict[str, Any]] = {
    # expansion, channels, blocks, stride: fewer strides and blocks than for 224 pixels
    "mobilenet_v2": {"model": "torchvision/mobilenet_v2", "model_kwargs": {
        "width_mult": 0.5, "inverted_residual_setting": [
            [1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 2], [6, 96, 2, 1], [6, 160, 2, 2]]}},
    "resnet": {"model": "resnet10t", "model_kwargs": {"channels": [32, 64, 128, 256], "stem_width": 16}},
}  # fmt: skip
SEARCHES: dict[str, dict[str, Any]] = {
    "searched": {"mode": "fast"},
    "reference, loss": {"mode": "reference", "rank": "loss"},
    "reference, per cost": {"mode": "reference", "rank": "per_cost"},
}
REPEATED = (*SEARCHES, "uniform")  # fine-tuned with all seeds, the other methods with seed 0
METHODS = (*REPEATED, "random", "evolutionary", "importance")
PART = 250  # held-out images that are scored together


def main(argv: list[str] | None = None) -> None:
    """Run what has no result yet, then make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, metavar="DIR")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of results; what is there is not done again"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tuning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", metavar="FILE", help="write the table between the markers of this page")
    parser.add_argument("--only-table", action="store_true", help="run nothing, make the table of what there is")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if not args.only_table:
        for name in args.models:
            Comparison(output / name, name, args).run()
    table = make_table(output)
    print(table)
    if args.docs:
        put_table(Path(args.docs), "search", table)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, flipped and shifted by up to four pixels: at random by (seed, epoch, image)."""

    def __init__(self, inputs: Tensor, targets: Tensor, seed: int) -> None:
        self.inputs, self.targets = F.pad(inputs, (4, 4, 4, 4)), targets  # (N, 3, H + 8, W + 8), (N,)
        self.seed, self.epoch = seed, 0  # the epoch is set by the trainer

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        size = self.inputs.shape[-1] - 8
        generator = torch.Generator().manual_seed((self.seed * 1009 + self.epoch) * 1_000_003 + item)
        down, right, flip = torch.randint(0, 9, (3,), generator=generator).tolist()
        image = self.inputs[item, :, down : down + size, right : right + size]
        return (image.flip(2) if flip % 2 else image), self.targets[item]  # (3, H, W), ()


class Comparison:
    """All methods on one model."""

    def __init__(self, folder: Path, name: str, args: argparse.Namespace) -> None:
        self.folder, self.methods, self.seeds = folder, args.methods, args.seeds
        defaults = parse_args("train", None, [])
        self.args = argparse.Namespace(
            **vars(defaults) | SHARED | MODELS[name] | {"data_dir": args.data_dir, "threads": args.threads, "seed": 0}
        )
        self.accelerator = make_accelerator(self.args)
        set_seed(0)
        self.supernet = make_supernet(self.args)  # fills in the interpolation
        self.supernet.to(memory_format=torch.channels_last)
        folder.mkdir(parents=True, exist_ok=True)
        images = open_images(self.args)
        training, held_out = split_training(self.args, len(images.train), folder)
        self.training, self.held_out = self._load(images.train, training), self._load(images.train, held_out)
        self.test = self._load(images.test, range(len(images.test)))

    def _load(self, source: Any, indices: Any) -> tuple[Tensor, Tensor]:
        batches = load_batches(self.args, source, indices, self.accelerator)
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return inputs.contiguous(memory_format=torch.channels_last), targets

    def run(self) -> None:
        """Train, search, fine-tune: all that has no result yet."""
        self._train()
        results = {method: self._search(method) for method in self.methods}
        tasks = itertools.product(self.seeds, range(len(BUDGETS["macs"])), self.methods)
        todo = [task for task in tasks if task[0] == 0 or task[2] in REPEATED]
        for seed, index, method in tqdm(todo, desc="fine-tuning"):
            self._retrain(method, results[method].networks[index], seed)

    def _train(self) -> None:
        path, model = self.folder / SUPERNET, self.supernet.model
        if not path.is_file():
            args = argparse.Namespace(**vars(self.args) | TRAINING)
            loader = DataLoader(Augmented(*self.training, args.seed), args.batch_size, shuffle=True, drop_last=True)
            start = find_start(self.accelerator, args, self.folder, {"training_images": len(self.training[1])})
            training = prepare(self.accelerator, args, start, self.supernet, model, loader)
            sandwich = Sandwich(self.accelerator, args, self.supernet.space, updates=training.updates)
            Trainer(training, sandwich, describe=sandwich.describe).fit()
            write_weights(path, model)
        read_weights(path, model)

    def _search(self, method: str) -> SearchResult:
        path = self.folder / f"search-{make_slug(method)}.json"
        if path.is_file():
            return SearchResult.load(path)
        inputs, targets = self.held_out
        batches = list(zip(torch.split(inputs, PART), torch.split(targets, PART), strict=True))
        scores = SavedScores(self.folder / f"progress-{make_slug(method)}.json", {"part": PART}, self.accelerator)

        def score(subnet: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> float:
            return F.cross_entropy(subnet(batch[0]), batch[1]).item()

        with scores, add_time(self.folder / f"seconds-{make_slug(method)}.json"):
            result = choose_networks(self.supernet, method, HeldOut(batches, score), scores)
        result.save(path)
        scores.path.unlink(missing_ok=True)
        return result

    def _retrain(self, method: str, network: Found, seed: int) -> None:
        share = f"{100 * network.budget / cost(self.supernet).macs:.0f}pct"
        folder = self.folder / "finetune" / f"{make_slug(method)}-{share}-{seed}"
        path = folder / "result.json"
        if path.is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        args = argparse.Namespace(**vars(self.args) | RETRAINING | {"seed": seed})
        accelerator = make_accelerator(args)  # its seed orders the images
        model = self.supernet.extract(network.widths)
        inputs, targets = (torch.cat(parts) for parts in zip(self.training, self.held_out, strict=True))
        loader = DataLoader(Augmented(inputs, targets, args.seed), args.batch_size, shuffle=True, drop_last=True)

        def step(
            network: nn.Module, inputs: Tensor, targets: Tensor, update: int, backward: Backward
        ) -> dict[str, Tensor | None]:
            loss = F.cross_entropy(network(inputs), targets)
            backward(loss)
            return {"loss": loss}

        start = find_start(accelerator, args, folder, {"widths": network.widths.to_dict()})
        Trainer(prepare(accelerator, args, start, model, model, loader), step).fit()
        calibrate(model, torch.split(self.training[0][:2048], 256))
        write_json(path, {"method": method, "budget": share, "seed": seed, "top1": measure_top1(model, self.test)})


def choose_networks(supernet: Supernet, method: str, evaluate: HeldOut, scores: SavedScores) -> SearchResult:
    """Choose a network for every budget."""
    if method in SEARCHES:
        return search(supernet, BUDGETS, evaluate, scores=scores, **SEARCHES[method])
    return baseline(supernet, BUDGETS, evaluate, method, scores=scores)


@contextlib.contextmanager
def add_time(path: Path) -> Iterator[None]:
    """Add the seconds that a block took to those in a file, however it ends."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        write_json(path, (read_json(path) if path.is_file() else 0.0) + time.perf_counter() - begin)


@torch.no_grad()
def measure_top1(model: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy in percent on inputs (N, C, H, W) and targets (N,)."""
    model.eval()
    pairs = zip(torch.split(images[0], 500), torch.split(images[1], 500), strict=True)
    return 100 * sum(int((model(inputs).argmax(1) == targets).sum()) for inputs, targets in pairs) / len(images[1])


def make_slug(method: str) -> str:
    """Return the name of a method as a part of file names."""
    return method.replace(", ", "-").replace(" ", "-")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------- table


def make_table(output: Path) -> str:
    """Return the table of all results that there are; a dash stands for a missing one."""
    lines = []
    for name in MODELS:
        folder = output / name
        paths = {method: folder / f"search-{make_slug(method)}.json" for method in METHODS}
        searches = {method: SearchResult.load(path) for method, path in paths.items() if path.is_file()}
        if not searches:
            continue
        seconds = {method: read_json(folder / f"seconds-{make_slug(method)}.json") for method in searches}
        tests = [read_json(path) for path in sorted((folder / "finetune").glob("*/result.json"))]
        lines += [f"### {name}", "", *_make_work_rows(searches, seconds), "", *_make_network_rows(searches, tests), ""]
    return "\n".join(lines)


def _make_work_rows(searches: dict[str, SearchResult], seconds: dict[str, float]) -> list[str]:
    rows = ["| method | subnets scored | forward work (images x MACs) | wall time |", "|---|---|---|---|"]
    for method, result in searches.items():
        work = f"{result.evaluated_macs / 1e12:.3f}T"
        rows.append(f"| {method} | {result.evaluations} | {work} | {seconds[method]:.0f} s |")
    return rows


def _make_network_rows(searches: dict[str, SearchResult], tests: list[dict[str, Any]]) -> list[str]:
    rows = ["| budget | method | MACs | params | held-out loss | test top-1 | seeds |", "|---|---|---|---|---|---|---|"]
    for index, share in enumerate(BUDGETS["macs"]):
        for method, result in searches.items():
            network = result.networks[index]
            budget = share.replace("%", "pct")
            top1 = [test["top1"] for test in tests if test["method"] == method and test["budget"] == budget]
            spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
            accuracy = f"{statistics.mean(top1):.2f}{spread}" if top1 else "-"
            rows.append(
                f"| {share} | {method} | {network.cost.macs / 1e6:.3f}M | {network.cost.params / 1e6:.3f}M | "
                f"{network.loss:.4f} | {accuracy} | {len(top1)} |"
            )
    return rows


if __name__ == "__main__":
    run_command(main)
