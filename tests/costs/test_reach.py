"""How far a model can be slimmed, and what stands in the way."""

import pytest
import timm
import torch
from helpers.models import TwoGroups

from timm_autoslim import Cost, convert, cost, reach
from timm_autoslim.errors import ConfigError


def test_reach_is_that_of_the_graph_whatever_the_space_allows():
    supernet = convert(TwoGroups(32), torch.zeros(1, 3, 8, 8), min=0.9)
    limits = reach(supernet)
    half, narrowest = (supernet.space.from_dict({"stem": s, "inner": i}) for s, i in ((16, 32), (1, 1)))
    assert limits.widest == cost(supernet)
    assert (limits.half, limits.narrowest) == (cost(supernet, half), cost(supernet, narrowest))


def test_obstacles_add_up_to_what_is_above_a_quarter():
    supernet = convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))
    limits = reach(supernet)
    above = limits.half.macs / limits.widest.macs - 1 / 4
    assert sum(share for _, share in limits.obstacles) == pytest.approx(above)
    assert "stem: multiplies by a length that is no channel count" not in dict(limits.obstacles)


def test_numbers_in_paths_are_left_out_of_reasons():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=96)
    obstacles = reach(convert(model)).obstacles
    assert len({reason for reason, _ in obstacles}) == len(obstacles)
    assert not any(f".{n}." in reason for reason, _ in obstacles for n in range(3))


def test_a_model_that_is_no_supernet_is_refused():
    with pytest.raises(ConfigError, match="the supernet: got a TwoGroups; needed: a Supernet"):
        reach(TwoGroups())
    assert Cost(1, 2) == Cost(1, 2)
