"""Samplers of random widths, by name."""

import pytest
from helpers.sandwich import make_generator, small_supernet

from timm_autoslim.errors import ConfigError
from timm_autoslim.training.samplers import SAMPLERS


def test_samplers_draw_what_the_search_space_draws():
    space = small_supernet().space
    samples = {name: sample(space, make_generator()) for name, sample in SAMPLERS.items()}
    assert samples == {
        "independent": space.sample(make_generator()),
        "coarse": space.sample(make_generator(), steps=10),
        "multiplier": space.sample_multiplier(make_generator()),
    }
    assert samples["independent"] != samples["multiplier"]


def test_an_unknown_sampler_is_refused():
    with pytest.raises(
        ConfigError, match=r"^sampler: got 'uniform'; needed: one of \['independent', 'coarse', 'multiplier'\]"
    ):
        SAMPLERS.pick("uniform")
