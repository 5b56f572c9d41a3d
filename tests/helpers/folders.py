"""Folders of images, and the flags that name them."""

import argparse

from PIL import Image


def make_images(folder, classes, count=4):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(folder / name / f"{index}.png")


def make_args(**changes):
    args = {"dataset": None, "data_dir": None, "in_chans": 3, "num_classes": None, "workers": 0, "seed": 0,
            "train_split": None, "val_split": None}  # fmt: skip
    return argparse.Namespace(**args | changes)
