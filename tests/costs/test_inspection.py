"""What can be slimmed in a model, as a value."""

import json

import pytest
import timm
import torch

from timm_autoslim import convert, cost, inspect
from timm_autoslim.errors import TraceError


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


def test_what_is_no_model_is_refused():
    with pytest.raises(TraceError, match="got a str"):
        inspect("resnet18")
