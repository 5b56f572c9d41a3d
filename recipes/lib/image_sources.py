"""Sources of images: digits, folders without labels, parts of other sources; and what makes two of them the same."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import get_img_extensions
from torch.utils.data import Dataset

from timm_autoslim.errors import DataError

BAD_IN_A_ROW = 10  # unreadable images
UNLABELLED = -1  # the target of an image without a label


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
    """Some images of a source, or all of them; timm's create_loader sets `transform`.

    Of some images, the next one stands in for one that cannot be read. Of all, as for a test, each must be readable: an
    accuracy counts every image once.

    With a seed, what the transform draws depends on (seed, epoch, image) alone: not on the number of processes and
    workers, nor on the images before. So a resumed run sees the images that the uninterrupted one sees.
    """

    def __init__(self, source: Any, classes: int, indices: Sequence[int] | None = None, seed: int | None = None):
        if hasattr(source, "_max_retries"):  # of timm's datasets: an unreadable image raises at once
            source._max_retries = 1
        self.source, self.classes, self.seed = source, classes, seed
        self.indices = range(len(source)) if indices is None else indices
        self._tries = 1 if indices is None else BAD_IN_A_ROW
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
        for index in (self.indices[(item + more) % len(self)] for more in range(self._tries)):
            try:
                with _catch_log() as logged:
                    image, target = self.source[index]
            except Exception as error:  # a damaged file makes a reader raise anything
                said = logged[0] if logged else str(error)  # timm logs what is wrong, and raises something else
                faults.append(f"{_find_name(self.source, index)} cannot be read ({said})")
                if self._tries == 1:
                    raise DataError(
                        f"{faults[-1]}. Needed for a test: images that can be read; mend or remove it."
                    ) from error
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


class Selection(Dataset[tuple[Any, int]]):
    """Some images of a source, which is itself a source."""

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


class Unlabelled(Dataset[tuple[Any, int]]):
    """All images below a folder, at any depth; their target is UNLABELLED.

    Raises:
        DataError: the folder is not there, or holds no images.
    """

    def __init__(self, folder: str, mode: str) -> None:
        self.folder, self.mode = Path(folder), mode
        paths = self.folder.rglob("*") if self.folder.is_dir() else ()
        self.paths = sorted(path for path in paths if path.suffix.lower() in get_img_extensions())
        if not self.paths:
            fault = "holds no images" if self.folder.is_dir() else "is no folder that is here"
            raise DataError(f"--unlabelled: {folder} {fault}. Needed: a folder with images, at any depth.")

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
