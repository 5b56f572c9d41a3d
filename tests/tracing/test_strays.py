"""Weights that the code finds outside of the module tree are named, with what holds them."""

import pytest
import torch
from helpers.conversions import IMAGE, make_net
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert
from timm_autoslim.errors import NothingToSlimError
from timm_autoslim.tracing.strays import explain_stray


class Holder:
    """Holds a layer outside of the module tree."""

    def __init__(self, layer):
        self.layer = layer

    def run(self, x):
        return self.layer(x)


def test_a_layer_that_an_object_holds_is_named_with_the_object():
    model = make_net(body=lambda s, x: s.logits(s.b(s.holder.run(s.maps(x)).relu())))
    model.holder = Holder(model.a)
    reason = r"in a subnet, a.weight has its full width: a is also held by an object of class Holder \(holder\)"
    with pytest.raises(NothingToSlimError, match=reason):
        convert(model, IMAGE)


def test_a_weight_that_an_object_holds_is_fixed_with_the_object_as_the_reason():
    model = make_net(body=lambda s, x: s.logits(s.b(F.conv2d(s.maps(x), s.holder.layer["w"]).relu())))
    model.holder = Holder({"w": model.a.weight})
    supernet = convert(model, IMAGE)
    reason = "a.weight is also held by an object of class Holder (holder), outside of the module tree; the forward must"
    assert reason in supernet.repairs[0]
    assert "inner" in supernet.space.names


class Slotted:
    __slots__ = ("part",)


@pytest.mark.parametrize("way", ["an object in a list", "an object of an object", "slots", "nothing"])
def test_the_holder_is_found(way):
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4)))
    inner = Holder(model[1])
    slotted = Slotted()
    slotted.part = model[1]
    values = {"an object in a list": [{"a": inner}], "an object of an object": Holder(inner), "slots": slotted}
    model[0].extra = values.get(way)
    text = explain_stray(model, "1.0.weight")
    if way == "nothing":
        assert text == "1.0.weight has its full width: the forward must find it as self.1.0.weight"
    else:
        kind = "Slotted" if way == "slots" else "Holder"
        assert f"1 is also held by an object of class {kind} (0.extra), outside of the module tree" in text


def test_a_list_of_modules_is_no_holder():
    model = nn.Sequential(nn.Linear(2, 3))
    model.ways = [model[0], (model[0],), {"a": torch.ones(1)}]
    assert "also held" not in explain_stray(model, "0.weight")
