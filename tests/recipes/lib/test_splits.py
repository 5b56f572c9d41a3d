"""Training and held-out images are drawn once, and stay apart."""

import argparse

import pytest

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.splits import read_all_training, split_training


def test_held_out_images_are_disjoint_and_stay(tmp_path):
    args = argparse.Namespace(limit_train=0.5, held_out=0.2)
    training, held_out = split_training(args, 1000, tmp_path)
    assert (len(training), len(held_out)) == (400, 100)
    assert not set(training) & set(held_out)
    assert held_out != sorted(held_out)
    args.held_out = 0.5
    assert split_training(args, 1000, tmp_path) == (training, held_out)
    assert len(split_training(args, 1000, tmp_path, anew=True)[1]) == 250
    args.held_out = 0.2
    assert split_training(args, 1000, tmp_path, anew=True) == (training, held_out)
    assert sorted(read_all_training(tmp_path, 1000)) == sorted(training + held_out)
    with pytest.raises(DataError, match="drawn from 1000 training images, but there are 999 now"):
        split_training(args, 999, tmp_path)


def test_a_number_above_all_is_all(tmp_path):
    args = argparse.Namespace(limit_train=10_000, held_out=40)
    assert [len(part) for part in split_training(args, 240, tmp_path)] == [200, 40]


@pytest.mark.parametrize(
    ("limit_train", "held_out", "text"),
    [
        (0.0001, 0.1, r"--limit-train 0.0001 of 1000 training images is less than one image: .* as --limit-train 0.01"),
        (0.5, 500, "leaves none of 500"),
        (1.0, -1, "held-out"),
        (3, 0.1, "--held-out 0.1 of 3 training images is less than one image: .* as --held-out 0.34"),
        (0.001, 0.1, r"1 training image cannot be divided: .*limit-train 0.001 of 1000"),
    ],
)
def test_impossible_splits_are_refused(tmp_path, limit_train, held_out, text):
    with pytest.raises(DataError, match=text):
        split_training(argparse.Namespace(limit_train=limit_train, held_out=held_out), 1000, tmp_path)
    assert not list(tmp_path.iterdir())
