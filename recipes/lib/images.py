"""The training and the test images that the flags name."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.image_sources import Digits, Selection, Unlabelled
from timm_autoslim.recipes.lib.processes import is_first

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "validation", "test")
TEST_SHARE = 0.2  # of a folder that has no test images of its own


@dataclass(frozen=True)
class Images:
    """Two sources of (PIL image, class index), and the number of classes."""

    train: Any
    test: Any
    num_classes: int


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
        train, test = _divide(train)
        targets = _list_targets(train.source)
        absent = set(classes.values()) - {targets[index] for index in test.indices}
        _tell_absent([name for name in classes if classes[name] in absent], len(classes), "The test's fifth")
        return train, test, len(classes)
    tested = _read_classes(_open_split(test_path, args, mode))
    unknown = sorted(set(tested) - set(classes))
    if unknown:
        raise DataError(f"{test_path} has classes that {train_path} does not have: {', '.join(unknown[:5])}.")
    _tell_absent([name for name in classes if name not in tested], len(classes), str(test_path))
    return train, _open_split(test_path, args, mode, class_map=classes), len(classes)


def _tell_absent(names: Sequence[str], classes: int, where: str) -> None:
    """Warn of classes without test images; the first process alone."""
    if names and is_first():
        text = ", ".join([*names[:5], *(["..."] if names[5:] else [])])
        warnings.warn(
            f"{where} has no images of {len(names)} of {classes} classes ({text}): the accuracies are of the other "
            f"{classes - len(names)}.",
            stacklevel=2,
        )


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


def open_unlabelled(args: argparse.Namespace) -> Unlabelled | None:
    """Open the images of --unlabelled, if there are some.

    Raises:
        DataError: there are none in the folder.
    """
    return Unlabelled(args.unlabelled, "L" if args.in_chans == 1 else "RGB") if args.unlabelled else None


def _divide(source: Any) -> tuple[Selection, Selection]:
    """Divide the images of one folder into training and test images, always in the same way."""
    if hasattr(source, "_max_retries"):
        source._max_retries = 1
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    count = max(1, round(TEST_SHARE * len(order)))
    return Selection(source, order[count:]), Selection(source, order[:count])


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


def _list_targets(dataset: Any) -> list[int]:
    """Return the class of every image of timm's dataset of a folder or a .tar file."""
    reader = dataset.reader
    return [int(t) for t in reader.targets] if hasattr(reader, "targets") else [t for _, t in reader.samples]
