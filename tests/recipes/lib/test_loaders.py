"""Loaders over images: what is augmented, and classes that the model does not have."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.recipes import parse_train
from PIL import Image

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.image_sources import Digits, Subset
from timm_autoslim.recipes.lib.loaders import load_batches, make_evaluation_loader, make_training_loader


def test_a_class_that_the_model_does_not_have_is_named(tmp_path):
    images = [(Image.new("L", (16, 16)), target) for target in (0, 1, 2, 3)]
    subset = Subset(images, classes=3)
    assert subset[2][1] == 2
    with pytest.raises(DataError, match=r"Image 3 has the class 3, but the model has 3 classes \(0 to 2\): give"):
        subset[3]
    args = parse_train(tmp_path, "-b", "1", "-j", "1", num_classes=3)
    args.interpolation, args.crop_pct, args.crop_mode = "bilinear", 1.0, "center"
    with pytest.raises(DataError, match="Image 3 has the class 3"):
        list(make_evaluation_loader(args, images))  # from a worker process too


def test_images_are_augmented_by_seed_epoch_and_image_alone(tmp_path):
    args = parse_train(tmp_path, "--aa", "rand-m9", "--reprob", "0.5", color_jitter=0.4)
    args.interpolation = "bilinear"
    source = Digits(True, "L")

    def batches(indices, epoch, **changes):
        for name, value in changes.items():
            setattr(args, name, value)
        loader = make_training_loader(args, source, indices)
        loader.dataset.epoch = epoch
        state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        images = torch.stack([loader.dataset[item][0] for item in range(len(indices))])
        assert torch.equal(state[0], torch.get_rng_state())
        assert state[1:] == (random.getstate(), str(np.random.get_state()))
        return images

    indices = list(range(40, 72))
    first = batches(indices, 0)
    torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(batches(indices[::-1], 0).flip(0), first)
    assert not torch.equal(batches(indices, 1), first)
    assert not torch.equal(batches(indices, 0, seed=7), first)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "size", "sizes"), [(5, 1, [3, 2]), (5, 4, [3, 2]), (1, 4, [1]), (8, 4, [4, 4])])
def test_no_batch_in_memory_has_one_image_alone(images, size, sizes, tmp_path):
    args = parse_train(tmp_path, "-b", str(size), num_classes=10)
    args.interpolation, args.crop_pct, args.crop_mode = "bilinear", 1.0, "center"
    batches = load_batches(args, Digits(True, "L"), range(images), SimpleNamespace(device="cpu"))
    assert [len(targets) for _, targets in batches] == sizes
