"""What a training needs, as the flags say."""

import pytest
import torch
from helpers.recipes import parse, write_config
from torch.nn.functional import cross_entropy

from timm_autoslim.recipes.lib.training import AUXILIARY, choose_learning_rate, make_loss


def test_learning_rates_follow_the_images_of_an_update(tmp_path):
    config = write_config(tmp_path, lr=None)
    for flags, expected in {
        "--lr 0.3": 0.3, "--lr-base 0.1": 0.2, "--lr-base 0.1 --lr-base-size 128": 0.4,
        "--lr-base 0.1 --lr-base-scale sqrt": 0.1 * 2**0.5, "--opt adamw": 0.1 * 2**0.5, "--opt adamw --lr 1e-3": 1e-3,
    }.items():  # fmt: skip
        assert choose_learning_rate(parse("train", config, *flags.split()), 512) == pytest.approx(expected)


def test_auxiliary_classifiers_have_a_smaller_share_of_the_loss(tmp_path):
    loss = make_loss(parse("train", write_config(tmp_path), "--smoothing", "0"))
    logits, auxiliary, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    first, second = cross_entropy(logits, labels), cross_entropy(auxiliary, labels)
    assert torch.equal(loss(logits, labels), first)
    torch.testing.assert_close(loss((logits, auxiliary), labels), first + AUXILIARY * second)
