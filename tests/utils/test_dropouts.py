"""Modules that drop values in training are told from others."""

import timm
import torchvision
from torch import nn

from timm_autoslim.utils.dropouts import is_dropout


def test_dropouts_of_torch_timm_and_torchvision_are_told_from_other_modules():
    drops = [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), timm.layers.DropPath(0.1), timm.layers.PatchDropout(0.1),
             torchvision.ops.StochasticDepth(0.1, "row"), torchvision.ops.DropBlock2d(0.1, 3)]  # fmt: skip
    assert all(map(is_dropout, drops))
    assert not any(map(is_dropout, [nn.Identity(), nn.ReLU(), nn.RReLU(), nn.Linear(2, 2)]))
