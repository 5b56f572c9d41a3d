"""Batches: what is none is named, with its position and what to do."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from timm_autoslim.errors import DataError
from timm_autoslim.utils.batches import check_batches, divide_batch, join_singles, make_empty_error, run_batch

IMAGES = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (IMAGES, r"^batches: got a Tensor; .*; pass \[images\] for a single batch, or images.split\(32\)$"),
        (3, "^batches: got a int; needed: an iterable of at least one input tensor"),
    ],
)
def test_what_holds_no_batches_is_refused_at_once(batches, message):
    with pytest.raises(DataError, match=message):
        check_batches(batches)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (IMAGES, torch.zeros(2)),
            r"got a tuple; .*; if the loader yields \(inputs, targets\), pass `\(inputs for",
        ),
        (torch.zeros(()), r"got the shape \(\); needed: an input tensor \(N, C, H, W\) of at least one image"),
        (IMAGES[:0], r"got the shape \(0, 3, 4, 4\); needed: an input tensor"),
        (IMAGES / 0, "got numbers that are not finite; needed: images without NaN or infinity"),
    ],
)
def test_what_is_no_batch_is_refused_when_it_is_reached(batch, message):
    inputs = check_batches([IMAGES, batch])
    assert next(inputs) is IMAGES
    with pytest.raises(DataError, match=rf"^batches\[1\]: {message}"):
        next(inputs)


def test_tokens_are_batches_and_none_is_an_error_of_the_callers():
    tokens = torch.zeros(2, 5, dtype=torch.long)
    assert list(check_batches(iter([tokens]))) == [tokens]
    assert list(check_batches([])) == []
    assert str(make_empty_error()).startswith("batches: got none; needed: an iterable of at least one input tensor")


def test_a_batch_is_divided_where_it_is_one():
    images, scale = torch.arange(5.0), torch.ones(())
    batch = {"images": images, "other": [images[:, None]], "table": torch.zeros(3), "scale": scale, "flag": True}
    parts = list(divide_batch(batch, 2))
    assert [len(part["images"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["other"][0] for part in parts]), images[:, None])
    assert all(part["table"].shape == (3,) and part["scale"].shape == () and part["flag"] for part in parts)
    assert [part.tolist() for part in divide_batch(images, 4)] == [[0, 1, 2, 3], [4]]
    (same,) = divide_batch(batch, 5)
    assert same is batch


@pytest.mark.parametrize(
    ("sizes", "joined"),
    [
        ([20, 20, 1], [20, 21]),
        ([1, 20], [21]),
        ([20, 1, 1, 20], [20, 22]),
        ([1] * 70, [32, 38]),
        ([1, 1], [2]),
        ([20, 5], [20, 5]),
    ],
)
def test_batches_of_one_image_are_joined_to_their_neighbours(sizes, joined):
    images = torch.arange(sum(sizes) * 3.0).view(-1, 3)
    pairs = [((part, {"by name": part}), part[:, 0]) for part in images.split(sizes)]
    result = list(join_singles(iter(pairs), lambda pair: True))
    assert [len(targets) for _, targets in result] == joined
    for get in (lambda pair: pair[0][0], lambda pair: pair[0][1]["by name"]):
        assert torch.equal(torch.cat([get(pair) for pair in result]), images)
    assert torch.equal(torch.cat([targets for _, targets in result]), images[:, 0])


def test_batches_of_one_image_that_are_enough_stay_as_they_are():
    batches = [IMAGES[:1]] * 3
    assert all(x is y for x, y in zip(join_singles(batches, lambda _: False), batches, strict=True))


def test_one_image_in_all_is_too_few():
    with pytest.raises(DataError, match=r"got one image, .*; needed: two images or more"):
        list(join_singles([IMAGES[:1]], lambda _: True))


def test_a_batch_of_one_image_of_another_size_cannot_be_joined():
    with pytest.raises(
        DataError, match=r"batch is \(2, 3, 4, 4\) of .* and \(1, 3, 5, 5\) of .*; needed: two .* drop_last=True"
    ):
        list(join_singles([IMAGES, torch.zeros(1, 3, 5, 5)], lambda _: True))


def test_batches_whose_targets_are_no_tensors_cannot_be_joined():
    with pytest.raises(DataError, match="two images or more"):
        list(join_singles([(IMAGES, [3, 4]), (IMAGES[:1], [5])], lambda _: True))
    assert len(next(join_singles([(IMAGES, "train"), (IMAGES[:1], "train")], lambda _: True))[0]) == 3


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        ("a.jpg", "b.jpg", "batch[1] is 'a.jpg' in one and 'b.jpg' in the other"),
        ({"y": torch.zeros(4), "path": "a"}, {"y": torch.zeros(1), "path": "b"}, "batch[1]['path'] is 'a' in one"),
        ({"y": 3}, {"z": 3}, "batch[1] is {'y': 3} in one and {'z': 3} in the other"),
        ((torch.zeros(4), torch.zeros(2)), (torch.zeros(1), torch.zeros(2)), "batch[1][1] ((2,) of torch.float32"),
        (torch.zeros(4), torch.zeros(1).long(), "batch[1] is (4,) of torch.float32 on cpu in one and (1,) of"),
        ([3, 4], [5], "batch[1] is [3, 4] in one and [5] in the other"),
    ],
)
def test_what_keeps_batches_from_being_joined_is_named(one, other, text):
    images = torch.zeros(4, 3, 8, 8)
    with pytest.raises(DataError, match=re.escape(text)):
        list(join_singles([(images, one), (images[:1], other)], lambda _: True))


def test_an_array_of_numpy_is_told_how_it_becomes_a_tensor():
    with pytest.raises(DataError, match=r"batches\[0\]: got an array of numpy; .* torch.from_numpy\(array\)"):
        list(check_batches([np.zeros((2, 3, 8, 8))]))


def test_inputs_that_the_model_does_not_take_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(DataError, match=r"batches\[2\]: got inputs \(2, 3, 4, 4\) of torch.uint8, .*images.float"):
        run_batch(model, 2, IMAGES.to(torch.uint8))
    with pytest.raises(DataError, match=r"inputs \(5, 4, 4\) of torch.float32, on which the model raises RuntimeError"):
        run_batch(model, 0, torch.zeros(5, 4, 4))
