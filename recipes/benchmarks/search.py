"""Compare ways to search widths on CIFAR-10: one supernet, the same retraining for all, several seeds.

    python recipes/benchmarks/search.py --data-dir DIR --output runs/bench --docs docs/benchmarks.md

DIR holds CIFAR-10 as train.tar and test.tar (or folders) of class folders. For each model a supernet is trained by the
sandwich rule; every method then chooses one network for each budget, scored on the same held-out training images; every
network is fine-tuned from the supernet's weights in the same way, with several seeds, and tested once. OUTPUT/MODEL
holds all of it, each result in a file of its own: the same command goes on where it was stopped, and several processes
may work on different --models, or on different --methods or --seeds of one whose supernet is trained. The table is
printed, and with --docs written between the markers of a page.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
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

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from common import command, make_supernet, parse_args, read_weights, write_json, write_weights
from data import in_memory, open_images, read_split, split_training
from loop import Backward, Trainer
from processes import make_accelerator
from progress import Progress
from results import put_table
from train import Sandwich

import timm_autoslim
from timm_autoslim import HeldOut, SearchResult, Supernet

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
    "reference, error": {"mode": "reference", "rank": "error"},
    "reference, per cost": {"mode": "reference", "rank": "per_cost"},
}
REPEATED = (*SEARCHES, "uniform")  # fine-tuned with every seed, the others with seed 0
METHODS = (*REPEATED, "random", "evolutionary", "importance")
PART = 250  # held-out images that are scored together


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, metavar="DIR")
    parser.add_argument("--output", required=True, metavar="DIR", help="what is done already is not done again")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tuning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", metavar="FILE", help="write the table between the markers of this page")
    parser.add_argument("--only-table", action="store_true", help="run nothing, make the table of what there is")
    given = parser.parse_args(argv)
    output = Path(given.output)
    if not given.only_table:
        for name in given.models:
            Bench(output / name, name, given).run()
    table = make_table(output)
    print(table)
    if given.docs:
        put_table(Path(given.docs), "search", table)


class Augmented(Dataset):
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
        return (image.flip(2) if flip % 2 else image), self.targets[item]


class Bench:
    """All runs of one model."""

    def __init__(self, folder: Path, name: str, given: argparse.Namespace) -> None:
        self.folder, self.methods, self.seeds = folder, given.methods, given.seeds
        defaults = parse_args("train", None, [])
        self.args = argparse.Namespace(
            **vars(defaults) | SHARED | MODELS[name] | {"data_dir": given.data_dir, "threads": given.threads, "seed": 0}
        )
        self.accelerator = make_accelerator(self.args)
        set_seed(0)
        self.supernet = make_supernet(self.args)  # fills in the interpolation
        self.supernet.to(memory_format=torch.channels_last)
        folder.mkdir(parents=True, exist_ok=True)
        images = open_images(self.args)
        split_training(self.args, len(images.train), folder)
        training, held_out = read_split(folder, len(images.train))
        self.training, self.held_out = self._load(images.train, training), self._load(images.train, held_out)
        self.test = self._load(images.test, range(len(images.test)))

    def _load(self, source: Any, indices: Any) -> tuple[Tensor, Tensor]:
        chunks = in_memory(self.args, source, indices, self.accelerator)
        inputs, targets = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return inputs.contiguous(memory_format=torch.channels_last), targets

    def run(self) -> None:
        """Train, search, fine-tune: what is not done yet."""
        self._train()
        found = {method: self._search(method)["networks"] for method in self.methods}
        tasks = itertools.product(self.seeds, range(len(BUDGETS["macs"])), self.methods)
        todo = [task for task in tasks if task[0] == 0 or task[2] in REPEATED]
        for seed, index, method in tqdm(todo, desc="fine-tuning"):
            self._retrain(method, found[method][index], seed)

    def _train(self) -> None:
        path = self.folder / "supernet.safetensors"
        if not path.is_file():
            args = argparse.Namespace(**vars(self.args) | TRAINING)
            sandwich = Sandwich(self.accelerator, args, self.supernet.space, None)
            loader = DataLoader(Augmented(*self.training, args.seed), args.batch_size, shuffle=True, drop_last=True)
            trainer = Trainer(self.accelerator, args, self.folder, {"training_images": len(self.training[1])})
            trainer.fit(
                self.supernet, self.supernet.model, loader, sandwich, begin=sandwich.begin, describe=sandwich.describe
            )
            write_weights(path, self.supernet.model)
        read_weights(path, self.supernet.model)

    def _search(self, method: str) -> dict[str, Any]:
        path = self.folder / f"search-{slug(method)}.json"
        if path.is_file():
            return read(path)
        inputs, targets = self.held_out
        batches = list(zip(inputs.split(PART), targets.split(PART), strict=True))
        progress = Progress(self.folder / f"progress-{slug(method)}.json", {"part": PART}, self.accelerator)
        spent = self.folder / f"seconds-{slug(method)}.json"
        with progress, timed(spent), tqdm(desc=method, unit=" subnets") as bar:

            def score(subnet: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> float:
                bar.update(1 / len(batches))
                return F.cross_entropy(subnet(batch[0]), batch[1]).item()

            result = search(self.supernet, method, HeldOut(batches, score), progress)
        write_json(path, {"seconds": read(spent), **result.to_dict()})
        progress.path.unlink(missing_ok=True)
        return read(path)

    def _retrain(self, method: str, found: dict[str, Any], seed: int) -> None:
        share = f"{100 * found['budget'] / timm_autoslim.cost(self.supernet).macs:.0f}pct"
        folder = self.folder / "finetune" / f"{slug(method)}-{share}-{seed}"
        path = folder / "result.json"
        if path.is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        args = argparse.Namespace(**vars(self.args) | RETRAINING | {"seed": seed})
        accelerator = make_accelerator(args)  # its seed orders the images
        plain = self.supernet.extract(self.supernet.space.from_dict(found["widths"]))
        inputs, targets = (torch.cat(parts) for parts in zip(self.training, self.held_out, strict=True))
        loader = DataLoader(Augmented(inputs, targets, args.seed), args.batch_size, shuffle=True, drop_last=True)

        def step(
            network: nn.Module, inputs: Tensor, targets: Tensor, update: int, backward: Backward
        ) -> dict[str, Tensor | None]:
            loss = F.cross_entropy(network(inputs), targets)
            backward(loss)
            return {"loss": loss}

        Trainer(accelerator, args, folder, {"widths": found["widths"]}).fit(plain, plain, loader, step)
        timm_autoslim.calibrate(plain, self.training[0][:2048].split(256))
        write_json(path, {"method": method, "budget": share, "seed": seed, "top1": top1(plain, self.test)})


def search(supernet: Supernet, method: str, evaluate: HeldOut, scores: Progress) -> SearchResult:
    """Choose a network for every budget."""
    if method in SEARCHES:
        return timm_autoslim.search(supernet, BUDGETS, evaluate, scores=scores, **SEARCHES[method])
    return timm_autoslim.baseline(supernet, BUDGETS, evaluate, method, scores=scores)


@contextlib.contextmanager
def timed(path: Path) -> Iterator[None]:
    """Add the seconds that a block took to those in a file, however it ends."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        write_json(path, (read(path) if path.is_file() else 0.0) + time.perf_counter() - begin)


@torch.no_grad()
def top1(plain: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    """Accuracy in percent."""
    plain.eval()
    pairs = zip(images[0].split(500), images[1].split(500), strict=True)
    return 100 * sum(int((plain(x).argmax(1) == y).sum()) for x, y in pairs) / len(images[1])


def slug(method: str) -> str:
    """The name of a method as a part of file names."""
    return method.replace(", ", "-").replace(" ", "-")


def read(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------- table


def make_table(output: Path) -> str:
    """The table of all results that there are; a dash stands for what is missing."""
    lines = []
    for name in MODELS:
        found = {m: path for m in METHODS if (path := output / name / f"search-{slug(m)}.json").is_file()}
        if not found:
            continue
        searches = {method: read(path) for method, path in found.items()}
        results = [read(path) for path in sorted((output / name / "finetune").glob("*/result.json"))]
        lines += [f"### {name}", "", *_work_rows(searches), "", *_result_rows(searches, results), ""]
    return "\n".join(lines)


def _work_rows(searches: dict[str, Any]) -> list[str]:
    rows = ["| method | subnets scored | forward work (images x MACs) | wall time |", "|---|---|---|---|"]
    for method, search in searches.items():
        work = f"{search['evaluated_macs'] / 1e12:.3f}T"
        rows.append(f"| {method} | {search['evaluations']} | {work} | {search['seconds']:.0f} s |")
    return rows


def _result_rows(searches: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    rows = ["| budget | method | MACs | params | held-out loss | test top-1 | seeds |", "|---|---|---|---|---|---|---|"]
    for index, share in enumerate(BUDGETS["macs"]):
        for method, search in searches.items():
            network = search["networks"][index]
            tested = [r["top1"] for r in results if r["method"] == method and r["budget"] == share.replace("%", "pct")]
            spread = f" ± {statistics.stdev(tested):.2f}" if len(tested) > 1 else ""
            accuracy = f"{statistics.mean(tested):.2f}{spread}" if tested else "-"
            rows.append(
                f"| {share} | {method} | {network['macs'] / 1e6:.3f}M | {network['params'] / 1e6:.3f}M | "
                f"{network['error']:.4f} | {accuracy} | {len(tested)} |"
            )
    return rows


if __name__ == "__main__":
    command(main)
