"""The training and the test images that the flags name."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, get_img_extensions
from torch.utils.data import Dataset

from timm_autoslim.errors import DataError

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "validation", "test")
TEST_SHARE = 0.2  # of a folder that has no test images of its own
BAD_IN_A_ROW = 10  # unreadable images


@dataclass(frozen=True)
class Images:
    """Two sources of (PIL image, class index), and the number of classes."""

    train: Any
    test: Any
    num_classes: int


def hash_images(*parts: Any) -> str:
    """Return a hash of what sources of images are: names with class folders, sizes in bytes, their number.

    Files of the same name and size are taken for the same.
    """
    digest = hashlib.sha256()
    for part in parts:
        source = getattr(part, "source", part)
        digest.update(f"{len(part)} of {len(source)}\n".encode())
        if hasattr(source, "filenames"):
            for name, path in zip(source.filenames(), source.filenames(absolute=True), strict=True):
                size = Path(path).stat().st_size if Path(path).is_file() else 0  # of a .tar file there are only names
                digest.update(f"{name} {size}\n".encode())
    return digest.hexdigest()


class Subset(Dataset[tuple[Any, int]]):
    """Some images of a source; timm's create_loader sets `transform`.

    With a seed, what the transform draws depends on (seed, epoch, image) alone: not on the number of processes and
    workers, nor on the images before. So a resumed run sees the images that the uninterrupted one sees.
    """

    def __init__(self, source: Any, classes: int, indices: Sequence[int] | None = None, seed: int | None = None):
        if hasattr(source, "_max_retries"):  # of timm's datasets: an unreadable image raises at once
            source._max_retries = 1
        self.source, self.classes, self.seed = source, classes, seed
        self.indices = range(len(source)) if indices is None else indices
        self.transform: Callable[[Image.Image], Any] | None = None
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        index, image, target = self._read(item)
        labelled = not (isinstance(self.source, Joined) and index >= self.source.labelled)
        if labelled and not 0 <= int(target) < self.classes:
            raise DataError(
                f"Image {index} has the class {int(target)}, but the model has {self.classes} classes (0 to "
                f"{self.classes - 1}): give the --num-classes of the data."
            )
        if self.transform is None:
            return image, int(target)
        with seed_by(f"{self.seed} {self.epoch} {index}") if self.seed is not None else contextlib.nullcontext():
            return self.transform(image), int(target)

    def _read(self, item: int) -> tuple[int, Any, Any]:
        """Return an image that can be read, this one or the next of the subset: its index in the source, image, target.

        timm's datasets go on to the next image as well, but to one that may be of another subset.
        """
        faults = []
        for index in (self.indices[(item + more) % len(self)] for more in range(BAD_IN_A_ROW)):
            try:
                with _catch_log() as logged:
                    image, target = self.source[index]
            except Exception as error:  # a damaged file makes a reader raise anything
                said = logged[0] if logged else str(error)  # timm logs what is wrong, and raises something else
                faults.append(f"{_find_name(self.source, index)} cannot be read ({said})")
                warnings.warn(f"{faults[-1]}; the next image stands in for it.", stacklevel=2)
            else:
                return index, image, target
        raise DataError(f"{BAD_IN_A_ROW} images in a row cannot be read. The first: {faults[0]}. Mend the data.")


def _find_name(source: Any, index: int) -> str:
    """Return the path of an image's file, or its name or number where the source has no more."""
    if not hasattr(source, "filename"):
        return f"image {index}"
    try:
        return str(source.filename(index, absolute=True))
    except TypeError:
        return str(source.filename(index))


@contextlib.contextmanager
def _catch_log() -> Iterator[list[str]]:
    """Collect, for the length of a block, what timm's datasets would log of an image that cannot be read."""
    texts: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        reason = text.partition("). ")[2] if text.startswith("Skipped sample") else ""
        texts.extend([reason] if reason else [])
        return not reason

    logger = logging.getLogger("timm.data.dataset")
    logger.addFilter(keep)
    try:
        yield texts
    finally:
        logger.removeFilter(keep)


@contextlib.contextmanager
def seed_by(key: str) -> Iterator[None]:
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


class Digits(Dataset[tuple[Image.Image, int]]):
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
        DataError: they are missing or empty, or their classes contradict each other or --num-classes, or they do not
            have --in-chans.
    """
    if args.in_chans not in (1, 3):
        raise DataError(f"--in-chans {args.in_chans}: images are read in gray (1) or in colour (3).")
    mode = "L" if args.in_chans == 1 else "RGB"
    if args.dataset in (None, "digits") and not args.data_dir:
        train, test, classes = Digits(True, mode), Digits(False, mode), 10
    elif args.dataset == "digits":
        raise DataError(f"--dataset digits has its own images: leave out --data-dir {args.data_dir}.")
    elif args.dataset:
        splits = (args.train_split or "train", args.val_split or "validation")
        train, test = (_open_dataset(args, split, mode) for split in splits)
        classes = len(getattr(train, "classes", ())) or args.num_classes or 0
    else:
        train, test, classes = _open_folders(args, mode)
    if not classes:
        raise DataError(f"--dataset {args.dataset} does not tell its classes: give --num-classes.")
    if args.num_classes not in (None, classes):
        raise DataError(
            f"--num-classes {args.num_classes} contradicts the data, which have {classes} classes"
            f" ({args.data_dir or args.dataset or 'digits'}): leave it out, or give another --data-dir."
        )
    return Images(train, test, classes)


def _open_dataset(args: argparse.Namespace, split: str, mode: str) -> Any:
    """Open one split of a dataset that timm's create_dataset has by name, such as torch/cifar10."""
    try:
        dataset = create_dataset(args.dataset, root=args.data_dir, split=split, input_img_mode=mode)
        len(dataset)
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"--dataset {args.dataset} cannot be read from --data-dir {args.data_dir}: {error} It needs a dataset "
            "that timm knows by name and that has a length."
        ) from error
    return dataset


def _open_folders(args: argparse.Namespace, mode: str) -> tuple[Any, Any, int]:
    """Open the training and test images of a folder; the test images are numbered by the training classes."""
    train_path, test_path = _find_folders(args)
    train = _open_split(train_path, args, mode)
    classes = _read_classes(train)
    if test_path is None:
        return *_divide(train), len(classes)
    unknown = sorted(set(_read_classes(_open_split(test_path, args, mode))) - set(classes))
    if unknown:
        raise DataError(f"{test_path} has classes that {train_path} does not have: {', '.join(unknown[:5])}.")
    return train, _open_split(test_path, args, mode, class_map=classes), len(classes)


def _find_folders(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the folders (or .tar files) of the training and of the test images; None where one holds both.

    Raises:
        DataError: there are no training images, or a split that the flags name is not there.
    """
    folder = Path(args.data_dir)
    if folder.suffix == ".tar" and folder.is_file():
        return folder, None
    if not folder.is_dir():
        raise DataError(f"The data folder {folder} does not exist: give --data-dir a folder of images.")
    train, test = (
        _find_split(folder, (named,) if named else names)
        for named, names in ((args.train_split, TRAIN_NAMES), (args.val_split, TEST_NAMES))
    )
    for path, flag, named in ((train, "--train-split", args.train_split), (test, "--val-split", args.val_split)):
        if named and path is None:
            raise DataError(f"{flag} {named}: {folder} holds {_list_content(folder)}.")
    if train is None and test is None and any(path.is_dir() for path in folder.iterdir()):
        return folder, None
    if train is None:
        raise DataError(
            f"The data folder {folder} holds {_list_content(folder)}, but needs train/ or train.tar, and val, "
            "validation or test: class folders of images; or class folders alone, which are divided."
        )
    return train, test


def _find_split(folder: Path, names: tuple[str, ...]) -> Path | None:
    paths = (path for name in names for path in (folder / name, folder / f"{name}.tar"))
    return next((path for path in paths if path.exists()), None)


def _list_content(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


class Part(Dataset[tuple[Any, int]]):
    """Some images of a source."""

    def __init__(self, source: Any, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.source[self.indices[index]]
        return image, int(target)

    def filename(self, index: int, absolute: bool = False) -> str:
        """Return the name of an image's file."""
        return str(self.source.filename(self.indices[index], absolute=absolute))


UNLABELLED = -1  # the target of an image without a label


class Unlabelled(Dataset[tuple[Any, int]]):
    """All images below a folder, at any depth; their target is UNLABELLED.

    Raises:
        DataError: the folder is not there, or holds no images.
    """

    def __init__(self, folder: str, mode: str) -> None:
        self.folder, self.mode = Path(folder), mode
        found = self.folder.rglob("*") if self.folder.is_dir() else ()
        self.paths = sorted(path for path in found if path.suffix.lower() in get_img_extensions())
        if not self.paths:
            got = "no images" if self.folder.is_dir() else "no such folder"
            raise DataError.at(f"--unlabelled {folder}", got=got, needed="a folder with images, at any depth")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.paths[index]) as image:
            return image.convert(self.mode), UNLABELLED

    def filenames(self, absolute: bool = False) -> list[str]:
        """Return the names of the files, in the folder or in full."""
        return [str(path if absolute else path.relative_to(self.folder)) for path in self.paths]


class Joined(Dataset[tuple[Any, int]]):
    """The images of a source, and behind them others without labels."""

    def __init__(self, source: Any, others: Unlabelled) -> None:
        self.source, self.others, self.labelled = source, others, len(source)

    def __len__(self) -> int:
        return self.labelled + len(self.others)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pair: tuple[Any, int] = self.source[index] if index < self.labelled else self.others[index - self.labelled]
        return pair

    def filename(self, index: int, absolute: bool = False) -> str:
        """Return the name of an image's file."""
        if index >= self.labelled:
            return self.others.filenames(absolute)[index - self.labelled]
        return str(self.source.filename(index, absolute=absolute))


def open_unlabelled(args: argparse.Namespace) -> Unlabelled | None:
    """Open the images of --unlabelled, if there are some.

    Raises:
        DataError: there are none in the folder.
    """
    return Unlabelled(args.unlabelled, "L" if args.in_chans == 1 else "RGB") if args.unlabelled else None


def _divide(source: Any) -> tuple[Part, Part]:
    """Divide the images of one folder into training and test images, always in the same way."""
    if hasattr(source, "_max_retries"):
        source._max_retries = 1
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    count = max(1, round(TEST_SHARE * len(order)))
    return Part(source, order[count:]), Part(source, order[:count])


def _open_split(path: Path, args: argparse.Namespace, mode: str, class_map: dict[str, int] | None = None) -> Any:
    # A tar file that stays open would share its position among forked workers, and they would read each other's bytes.
    tar = {"cache_tarfiles": args.workers == 0} if path.suffix == ".tar" else {}
    try:
        return create_dataset("", root=str(path), search_split=False, class_map=class_map, input_img_mode=mode, **tar)
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise DataError(f"{path} holds no images that timm can read in class folders ({error}).") from error


def _read_classes(dataset: Any) -> dict[str, int]:
    reader = dataset.reader
    classes: dict[str, int] = reader.class_to_idx if hasattr(reader, "class_to_idx") else reader.class_name_to_idx
    return classes
