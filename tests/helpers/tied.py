"""A small model with a tied weight and every kind of attribute, its slices, and what its attributes then are."""

import torch
from torch import nn

from timm_autoslim.slicing.slices import Slices


class Tied(nn.Module):
    """Two linear layers that share a weight, a tensor that is no parameter, and integers in every kind of container."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale = torch.rand(6)
        self.width, self.shape, self.parts = 6, (6, 2), [6, 6]
        self.info = [{"num_chs": 6, "sizes": (1, 6)}]

    def forward(self, x):
        return self.second(self.first(x) * self.scale)


HALF = ((0, 3),)
TIED_SLICES = Slices(
    {
        "first.weight": (HALF, HALF),
        "second.weight": (HALF, HALF),
        "first.bias": (HALF,),
        "second.bias": (HALF,),
        "scale": (HALF,),
    },
    {"width": 3, "shape.0": 3, "parts.1": 3, "info.0.num_chs": 3, "info.0.sizes.1": 3, "first.in_features": 3},
)
SLICED_ATTRIBUTES = {"width": 3, "shape": (3, 2), "parts": [6, 3], "info": [{"num_chs": 3, "sizes": (1, 3)}]}
