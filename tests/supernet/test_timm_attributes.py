"""timm's optimizers make the same groups of a supernet as of its model."""

import copy
import pickle

import pytest
import timm
import torch
from helpers.marks import slow_but
from helpers.models import TwoGroups
from timm.optim import create_optimizer_v2
from torch import nn

from timm_autoslim import convert
from timm_autoslim.supernet.timm_attributes import TIMM_ATTRIBUTES


class Listed(TwoGroups):
    """Names parameters by a pattern, and its layers by a function."""

    def no_weight_decay(self):
        return ["out*.weight", "head.weight"]

    def group_matcher(self, coarse=False):
        return lambda name: (1 if coarse else 0) if name.startswith("stem") else (2, 5)


class Grouped(TwoGroups):
    """Names its classifiers alone."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"classifier": ("head", "bn_outer"), "input_size": (3, 8, 8)}


def make_timm(name, size=32, **arguments):
    return timm.create_model(name, num_classes=5, **arguments), torch.zeros(1, 3, size, size)


MODELS = {
    "no attributes": lambda: (TwoGroups(), torch.zeros(1, 3, 8, 8)),
    "patterns and a function": lambda: (Listed(), torch.zeros(1, 3, 8, 8)),
    "classifiers": lambda: (Grouped(), torch.zeros(1, 3, 8, 8)),
    "resnet": lambda: make_timm("resnet10t"),
    "vit": lambda: make_timm("vit_tiny_patch16_224", img_size=32, depth=2),
    "swin": lambda: make_timm("swin_tiny_patch4_window7_224", 56, img_size=56, depths=(1, 1, 1, 1)),
    "convnext": lambda: make_timm("convnext_atto"),
}


def list_groups(model, **options):
    """Return the parameters of every group of an optimizer, and the group's settings."""
    groups = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.05, **options).param_groups
    return [([id(p) for p in group["params"]], {k: v for k, v in group.items() if k != "params"}) for group in groups]


@pytest.fixture(scope="module", params=slow_but(list(MODELS)[:5], MODELS))
def supernet(request):
    return convert(*MODELS[request.param]())


def test_an_optimizer_has_the_groups_of_the_model(supernet):
    for options in ({}, {"layer_decay": 0.7}):
        expected = list_groups(supernet.model, **options)
        assert list_groups(supernet, **options) == expected
        assert len(expected) > 1


def test_a_supernet_has_what_its_model_has(supernet):
    for name in TIMM_ATTRIBUTES:
        assert hasattr(supernet, name) == hasattr(supernet.model, name)
    for again in (copy.deepcopy(supernet), pickle.loads(pickle.dumps(convert(TwoGroups(), torch.zeros(1, 3, 8, 8))))):
        assert isinstance(again.model, nn.Module)
    with pytest.raises(AttributeError, match="'Supernet' object has no attribute 'nothing'"):
        supernet.nothing  # noqa: B018
