"""What can be slimmed in a model, as a value."""

import json
import re

import pytest
import timm
import torch
from torch import nn

from timm_autoslim import convert, cost, inspect
from timm_autoslim.errors import NothingToSlimError, TraceError


def test_an_inspection_says_what_the_supernet_says():
    model, image = timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)
    supernet, inspection = convert(model, image), inspect(model, image)
    assert inspection.groups == supernet.space.groups
    assert sum(one.count for one in inspection.fixed) == len(supernet.graph.fixed)
    assert all(supernet.graph.fixed[one.name, one.axis] == one.reason for one in inspection.fixed)
    assert sum(wide for wide, _ in inspection.macs_by_module.values()) == cost(supernet).macs
    assert supernet.space.table() in str(inspection)
    assert inspect(model, image) == inspection
    content = json.loads(json.dumps(inspection.to_dict()))
    assert content["widest"]["macs"] == cost(supernet).macs
    assert [group["name"] for group in content["groups"]] == list(supernet.space.names)


def test_an_inspection_takes_the_rules_of_convert():
    model, image = timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)
    rules = {"freeze": "layer1", "min": 0.5, "choices": {"layer4": [64]}}
    assert inspect(model, image, **rules).groups == convert(model, image, **rules).space.groups
    with pytest.raises(TypeError, match=r"inspect\(\) got an unexpected keyword argument 'mim': did you mean 'min'"):
        inspect(model, image, mim=0.5)
    with pytest.raises(TypeError, match=r"'order'; rules are freeze, min, divisor, choices, keep_output, whole"):
        inspect(model, image, order="l1")


def test_what_is_no_model_is_refused():
    with pytest.raises(TraceError, match="got a str"):
        inspect("resnet18")


class Tower(nn.Module):
    """Features as its output, and a part that no forward uses."""

    def __init__(self, unused=0):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, padding=1)
        self.outer, self.layers = nn.Conv2d(24, 16, 1), nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))
        self.unused = nn.Sequential(nn.Conv2d(16, unused, 3)) if unused else nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        x = x + self.outer(self.inner(x).relu())
        for layer in self.layers:
            x = x + layer(x.relu())
        return x


def test_what_would_help_is_named():
    (unused, outputs) = inspect(Tower(99), torch.zeros(1, 3, 8, 8)).advice
    assert unused == "no forward uses 73% of the parameters (unused): delete these modules before convert"
    assert "of the MACs are held by the model's outputs" in outputs
    assert "convert(model, keep_output=False)" in outputs
    assert "what would help:" in str(inspect(Tower(99), torch.zeros(1, 3, 8, 8)))
    assert inspect(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)).advice == ()


def test_a_tower_of_which_nothing_shrinks_is_told_of_its_output():
    tower = nn.Sequential(nn.Conv2d(3, 16, 3))
    with pytest.raises(NothingToSlimError, match=r"features that may be narrower, convert\(model, keep_output=False\)"):
        inspect(tower, torch.zeros(1, 3, 8, 8))


class Wide(nn.Module):
    """A path of its code needs a width."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        x = self.a(x)
        return self.head((x.relu() if x.shape[1] >= 4 else x).mean((2, 3)))


def test_a_least_width_has_the_line_that_asks_for_it():
    inspection = inspect(Wide(), torch.zeros(1, 3, 8, 8))
    reason = inspection.least_widths["a"]
    assert re.fullmatch(r"the code asks about their number at .*test_inspection\.py:\d+", reason)
    assert f"least widths, and why:\n  a: 4, {reason}\n" in str(inspection)
    assert inspection.to_dict()["least_widths"] == {"a": reason}
    assert "least widths" not in str(
        inspect(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), torch.zeros(1, 3, 8, 8))
    )
