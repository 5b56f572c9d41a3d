"""Blocks: what a supernet computes inside of them, nested, crossed, copied, and left by errors."""

import copy
import pickle

import pytest
import torch
from helpers.comparisons import assert_same, snapshot

from timm_autoslim import convert

IMAGE = torch.zeros(1, 3, 8, 8)


def test_inside_a_block_the_supernet_is_the_subnet_and_its_model_is_the_widest(supernet, images, narrow):
    expected, widest = supernet.extract(narrow)(images), supernet(images)
    assert supernet.open_block is None
    with supernet.at(narrow):
        assert supernet.open_block == narrow
        assert torch.equal(supernet(images), expected)
        assert torch.equal(supernet(images, narrow), expected)
        assert torch.equal(supernet(images, supernet.space.max()), widest)
        assert torch.equal(supernet.model(images), widest)
        assert torch.equal(supernet.extract(narrow)(images), expected)
    assert torch.equal(supernet(images), widest)


def test_blocks_can_be_nested_and_crossed(supernet, images, narrow):
    least, other = supernet.space.min(), convert(supernet.model, IMAGE)
    outputs = {widths: supernet(images, widths) for widths in (narrow, least)}
    with supernet.at(narrow):
        with supernet.at(least):
            assert torch.equal(supernet(images), outputs[least])
        assert torch.equal(supernet(images), outputs[narrow])
    first, second = supernet.at(narrow), other.at(other.space.min())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(supernet(images), supernet.model(images))
    assert torch.equal(other(images), outputs[least])
    second.__exit__(None, None, None)
    assert torch.equal(other(images), supernet.model(images))


def test_every_call_in_a_block_takes_the_weights_as_they_are_then(supernet, images, narrow):
    with supernet.at(narrow):
        before = supernet(images)
        with torch.no_grad():
            supernet.model.stem.weight.add_(1)
        assert not torch.equal(supernet(images), before)
        assert torch.equal(supernet(images), supernet.extract(narrow)(images))


def test_a_block_that_was_never_closed_is_gone_with_what_opened_it(supernet, images, narrow):
    block = supernet.at(narrow)
    block.__enter__()
    assert supernet.open_block == narrow
    del block  # as where an interrupt comes between its opening and its body
    assert supernet.open_block is None
    assert torch.equal(supernet(images), supernet.model(images))


def test_a_block_ends_when_its_body_raises(supernet, images, narrow):
    before = snapshot(supernet.model)
    with pytest.raises(ZeroDivisionError), supernet.at(narrow):
        raise ZeroDivisionError
    assert_same(before, snapshot(supernet.model))
    supernet(images, narrow)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda supernet: pickle.loads(pickle.dumps(supernet))])
def test_a_copy_made_in_a_block_is_whole_and_has_no_block(supernet, images, narrow, make):
    expected = supernet(images, narrow), supernet(images)
    before = snapshot(supernet.model)
    with supernet.at(narrow):
        again, model = make(supernet), make(supernet.model)
        assert again.open_block is None
        assert supernet.open_block == narrow
        assert torch.equal(again(images, narrow), expected[0])
        assert torch.equal(again(images), expected[1])
        assert torch.equal(model(images), expected[1])
        with again.at(again.space.min()):
            assert supernet.open_block == narrow
    assert_same(before, snapshot(supernet.model))
    assert torch.equal(again(images), expected[1])
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in supernet.state_dict().items()}
