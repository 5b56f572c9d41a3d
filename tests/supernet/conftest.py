"""A small supernet, images for it, and widths between its narrowest and its widest."""

import pytest
import torch
from helpers.models import TwoGroups, randomise

from timm_autoslim import convert


@pytest.fixture
def supernet():
    return convert(randomise(TwoGroups()).eval(), torch.zeros(1, 3, 8, 8))


@pytest.fixture
def images():
    return torch.randn(4, 3, 8, 8)


@pytest.fixture
def narrow(supernet):
    return supernet.space.from_dict({"stem": 5, "inner": 7})
