"""Images for the recipes: where they come from, how they are split, and timm's loaders over them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from common import write_json
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_autoslim.errors import DataError

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "validation", "test")


@dataclass(frozen=True)
class Images:
    """Two sources of (PIL image, class index), and the number of classes."""

    train: Any
    test: Any
    num_classes: int


class Subset(Dataset):
    """Some images of a source; timm's create_loader sets `transform`.

    With a seed, what the transform draws depends on (seed, epoch, image) alone: not on the number of processes and
    workers, nor on the images before. So a resumed run sees the images that the uninterrupted one sees.
    """

    def __init__(self, source: Any, classes: int, indices: Sequence[int] | None = None, seed: int | None = None):
        self.source, self.classes, self.seed = source, classes, seed
        self.indices = range(len(source)) if indices is None else indices
        self.transform: Callable[[Image.Image], Any] | None = None
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        index = self.indices[item]
        image, target = self.source[index]
        if not 0 <= int(target) < self.classes:
            raise DataError(
                f"Image {index} has the class {int(target)}, but the model has {self.classes} classes (0 to "
                f"{self.classes - 1}): give the --num-classes of the data."
            )
        if self.transform is None:
            return image, int(target)
        with drawing(f"{self.seed} {self.epoch} {index}") if self.seed is not None else contextlib.nullcontext():
            return self.transform(image), int(target)


@contextlib.contextmanager
def drawing(key: str) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's random numbers by a text for the length of a block; restore on leaving."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Digits(Dataset):
    """Scikit-learn's 1,797 digits of 8 x 8 pixels: of every class each fifth is a test image (1,437 and 360)."""

    def __init__(self, train: bool, mode: str):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("--dataset digits needs scikit-learn: pip install scikit-learn.") from error
        pixels, targets = load_digits(return_X_y=True)  # (1797, 64) in 0..16, (1797,)
        by_class = sorted(range(len(targets)), key=lambda index: targets[index])  # stable: file order within a class
        self.indices = [index for rank, index in enumerate(by_class) if (rank % 5 != 0) == train]
        self.pixels = (pixels * (255 / 16)).round().astype("uint8").reshape(-1, 8, 8)
        self.targets, self.mode = targets, mode

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Image.Image, int]:
        index = self.indices[item]
        return Image.fromarray(self.pixels[index]).convert(self.mode), int(self.targets[index])


def open_images(args: argparse.Namespace) -> Images:
    """Open the training and the test images that the flags name.

    Raises:
        DataError: they are missing or empty, or their classes contradict each other or --num-classes.
    """
    mode = "L" if args.in_chans == 1 else "RGB"
    if args.dataset in (None, "digits") and not args.data_dir:
        train, test, classes = Digits(True, mode), Digits(False, mode), 10
    elif args.dataset == "digits":
        raise DataError(f"--dataset digits has its own images: leave out --data-dir {args.data_dir}.")
    elif args.dataset:
        train, test = (_named(args, split, mode) for split in ("train", "validation"))
        classes = len(getattr(train, "classes", ())) or args.num_classes or 0
    else:
        train, test, classes = _folders(args, mode)
    if not classes:
        raise DataError(f"--dataset {args.dataset} does not tell its classes: give --num-classes.")
    if args.num_classes not in (None, classes):
        raise DataError(
            f"--num-classes {args.num_classes} contradicts the data, which have {classes} classes"
            f" ({args.data_dir or args.dataset or 'digits'}): leave it out, or give another --data-dir."
        )
    return Images(train, test, classes)


def _named(args: argparse.Namespace, split: str, mode: str) -> Any:
    """One split of a dataset that timm's create_dataset knows by name, such as torch/cifar10."""
    try:
        dataset = create_dataset(args.dataset, root=args.data_dir, split=split, input_img_mode=mode)
        len(dataset)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"--dataset {args.dataset} cannot be read from --data-dir {args.data_dir}: {error} It needs a dataset "
            "that timm knows by name and that has a length."
        ) from error
    return dataset


def _folders(args: argparse.Namespace, mode: str) -> tuple[Any, Any, int]:
    """Training and test images of a folder; the test images are numbered by the training classes."""
    train_path, test_path = _find(args.data_dir, TRAIN_NAMES), _find(args.data_dir, TEST_NAMES)
    train = _read(train_path, args, mode)
    classes = _classes(train)
    unknown = sorted(set(_classes(_read(test_path, args, mode))) - set(classes))
    if unknown:
        raise DataError(f"{test_path} has classes that {train_path} does not have: {', '.join(unknown[:5])}.")
    return train, _read(test_path, args, mode, class_map=classes), len(classes)


def _find(data_dir: str, names: tuple[str, ...]) -> Path:
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"The data folder {data_dir} does not exist: give --data-dir a folder of images.")
    for name in names:
        for path in (folder / name, folder / f"{name}.tar"):
            if path.exists():
                return path
    wanted = " or ".join(f"{name}/ or {name}.tar" for name in names)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"The data folder {data_dir} holds {found}, but needs {wanted}: class folders of images.")


def _read(path: Path, args: argparse.Namespace, mode: str, class_map: dict[str, int] | None = None) -> Any:
    # A tar file that stays open would share its position among forked workers, and they would read each other's bytes.
    tar = {"cache_tarfiles": args.workers == 0} if path.suffix == ".tar" else {}
    try:
        return create_dataset("", root=str(path), search_split=False, class_map=class_map, input_img_mode=mode, **tar)
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise DataError(f"{path} holds no images that timm can read in class folders ({error}).") from error


def _classes(dataset: Any) -> dict[str, int]:
    reader = dataset.reader
    return reader.class_to_idx if hasattr(reader, "class_to_idx") else reader.class_name_to_idx


# --------------------------------------------------------------------------------------------------------- splits


def split_training(args: argparse.Namespace, total: int, folder: Path) -> tuple[list[int], list[int]]:
    """Split the training images into those that train the supernet and those held out for the search.

    The split is drawn once and kept in the run folder as held_out.json. Both lists are shuffled, so that any run of
    them mixes the classes. The same --limit-train and --held-out give the same split, whatever the seed.

    Returns:
        (training indices, held-out indices)
    """
    path = folder / "held_out.json"
    if path.is_file():
        return read_split(folder, total)
    used = _count(args.limit_train, total, "--limit-train")
    held = _count(args.held_out, used, "--held-out") if args.held_out else 0
    if held >= used:
        raise DataError(f"--held-out {args.held_out} leaves none of {used} training images to train on.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()[:used]
    write_json(path, {"total": total, "training": order[held:], "held_out": order[:held]})
    return order[held:], order[:held]


def read_split(folder: Path, total: int) -> tuple[list[int], list[int]]:
    """Read the split of a run folder: (training indices, held-out indices)."""
    split = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    if split["total"] != total:
        raise DataError(
            f"{folder}/held_out.json was drawn from {split['total']} training images, but there are {total} now: "
            "give the --data-dir of that run, or start another one."
        )
    return split["training"], split["held_out"]


def used_training(folder: Path, total: int) -> list[int]:
    """All training images that the run may use, the held-out ones too: what a found network is trained on."""
    training, held_out = read_split(folder, total)
    return held_out + training


def _count(amount: float, total: int, flag: str) -> int:
    """How many images a share (up to 1) or a number (above 1) is."""
    count = round(amount * total) if amount <= 1 else int(amount)
    if not 0 < count <= total:
        raise DataError(f"{flag} {amount:g} asks for {count} of {total} images: give a share up to 1, or a number.")
    return count


# --------------------------------------------------------------------------------------------------------- loaders


def training_loader(args: argparse.Namespace, source: Any, indices: Sequence[int]) -> DataLoader:
    """Timm's training loader over some images of a source; Accelerate shuffles and shards it."""
    if len(indices) < args.batch_size:
        raise DataError(f"{len(indices)} training images do not fill a batch of {args.batch_size}: lower --batch-size.")
    return create_loader(
        Subset(source, args.num_classes, indices, args.seed), is_training=True, scale=args.scale, ratio=args.ratio,
        hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter, auto_augment=args.aa, re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount, **_shared(args),
    )  # fmt: skip


def plain_loader(args: argparse.Namespace, source: Any, indices: Sequence[int] | None = None) -> DataLoader:
    """Timm's evaluation loader over some images of a source, or all of them."""
    subset = Subset(source, args.num_classes, indices)
    return create_loader(subset, is_training=False, crop_pct=args.crop_pct, **_shared(args))


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    # Accelerate's prepare() shards and moves batches; timm's prefetcher would pass through it untouched.
    # Workers start anew each epoch, so that their random numbers depend on the epoch alone.
    return {
        "input_size": (args.in_chans, args.img_size, args.img_size), "batch_size": args.batch_size,
        "interpolation": args.interpolation, "mean": args.mean, "std": args.std, "num_workers": args.workers,
        "distributed": False, "use_prefetcher": False, "persistent_workers": False,
        "pin_memory": torch.cuda.is_available(),
    }  # fmt: skip


def in_memory(
    args: argparse.Namespace, source: Any, indices: Sequence[int], accelerator: Accelerator
) -> list[tuple[Tensor, Tensor]]:
    """Load images once, onto the device, as chunks of nearly equal size: inputs (N, C, H, W) and targets (N,)."""
    inputs, targets = (torch.cat(parts) for parts in zip(*plain_loader(args, source, indices), strict=True))
    if args.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    chunks = -(-len(inputs) // args.batch_size)
    pairs = zip(inputs.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    return [(chunk.to(accelerator.device), labels.to(accelerator.device)) for chunk, labels in pairs]


def calibration_batches(
    args: argparse.Namespace, source: Any, indices: Sequence[int], accelerator: Accelerator
) -> list[Tensor]:
    """This process's share of --calibration-images, without augmentation, in memory: as many batches as each other's.

    Raises:
        DataError: there are too few images for a batch of two in every process.
    """
    used, processes = list(indices[: args.calibration_images]), accelerator.num_processes
    if args.calibration_images < 1 or len(used) < 2 * processes:
        raise DataError(
            f"--calibration-images {args.calibration_images}: {len(used)} images do not measure a BatchNorm in "
            f"{processes} process(es), which needs two in each and should have hundreds."
        )
    own = len(used) // processes  # what is left over is left out
    share = used[accelerator.process_index * own :][:own]
    return [inputs for inputs, _ in in_memory(args, source, share, accelerator)]
