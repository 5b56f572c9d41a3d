"""What a training needs, as the flags say."""

import pytest
from helpers.recipes import parse, write_config

from timm_autoslim.recipes.lib.training import choose_learning_rate


def test_learning_rates_follow_the_images_of_an_update(tmp_path):
    config = write_config(tmp_path, lr=None)
    for flags, expected in {
        "--lr 0.3": 0.3, "--lr-base 0.1": 0.2, "--lr-base 0.1 --lr-base-size 128": 0.4,
        "--lr-base 0.1 --lr-base-scale sqrt": 0.1 * 2**0.5, "--opt adamw": 0.1 * 2**0.5, "--opt adamw --lr 1e-3": 1e-3,
    }.items():  # fmt: skip
        assert choose_learning_rate(parse("train", config, *flags.split()), 512) == pytest.approx(expected)
