"""The proof: subnets run beside the record, and what disagrees is fixed with a reason, or refused."""

import pytest
import timm
import torch
from helpers.bodies import IMAGE, Around, conv, convert_around
from helpers.models import randomise
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import NothingToSlimError, WidthError
from timm_autoslim.tracing import ops


def forgetful(flow, op):
    flow.set_labels(op.out, [None] * op.out.dim())


def test_a_wrong_rule_is_found_where_an_operator_fails(monkeypatch):
    monkeypatch.setattr(ops, "RULES", {**ops.RULES, "cat": forgetful})
    supernet = convert_around(lambda s, x: s.b(s.a(torch.cat([x, x], 1)).relu()), 8, a=conv(16, 8), b=conv(8, 8))
    assert supernet.repairs[0].startswith("a: in a subnet, aten.convolution.default fails")
    assert "stem" not in supernet.space.names
    assert "b" in supernet.space.names


def test_a_wrong_rule_is_found_where_a_module_gives_another_shape(monkeypatch):
    monkeypatch.setattr(ops, "RULES", {**ops.RULES, "relu": forgetful})
    supernet = convert_around(lambda s, x: s.act(s.a(x)), 8, a=conv(8, 8), act=nn.ReLU())
    assert supernet.repairs == ("act: in a subnet, an output has the shape (2, 4, 8, 8) instead of (2, 8, 8, 8)",)
    assert supernet.graph.fixed["a.weight", 0] == supernet.repairs[0]
    assert supernet.space["stem"].size == 8


class Switch(nn.Module):
    """Another part runs where the convolution is narrow."""

    def __init__(self, wide, narrow):
        super().__init__()
        self.conv, self.wide, self.narrow = conv(8, 8), wide, narrow

    def forward(self, x):
        x = self.conv(x)
        return self.wide(x) if len(self.conv.weight) > 6 else self.narrow(x)


@pytest.mark.parametrize(
    ("wide", "narrow", "message"),
    [
        (nn.ReLU(), nn.Sigmoid(), "switch.narrow: in a subnet, this module runs where"),
        (conv(8, 8), conv(8, 8), "switch.narrow: in a subnet, aten.convolution.default fails: "),
    ],
    ids=["another module", "a module that fails"],
)
def test_a_part_that_goes_another_way_at_other_widths_is_fixed_with_the_reason(wide, narrow, message):
    supernet = convert_around(lambda s, x: s.switch(s.a(x)), 8, a=conv(8, 8), switch=Switch(wide, narrow))
    (repair,) = supernet.repairs
    assert repair.startswith(message)
    assert supernet.graph.fixed["switch.conv.weight", 0] == repair
    assert supernet.space["stem"].size == 8  # what is before the part is free


def test_a_model_that_no_subnet_can_run_is_refused_with_the_reason():
    class Complete(Around):
        def forward(self, x):
            if [len(p) for p in self.parameters()] != self.lengths:
                raise RuntimeError("never narrower")
            return super().forward(x)

    model = Complete(lambda s, x: s.a(x), 8, a=conv(8, 8))
    model.lengths = [len(p) for p in model.parameters()]
    with pytest.raises(
        NothingToSlimError, match=r"in the way: .*the model: in a subnet, its forward raises RuntimeError: never na"
    ):
        convert(model, IMAGE)


@pytest.mark.slow
def test_a_width_of_one_that_cannot_run_is_not_offered():
    model = randomise(timm.create_model("nf_regnet_b0", num_classes=10)).eval()
    image = torch.zeros(1, 3, 64, 64)
    supernet = convert(model, image)  # its weights are standardised, which a single value cannot be
    assert supernet.graph.floor == 2
    assert supernet.repairs == ()
    group = next(g for g in supernet.space.groups if g.size >= 4)
    assert group.floor == 2
    sizes = {g.name: g.size for g in supernet.space.groups}
    with pytest.raises(WidthError, match=rf"{group.name}: got the width 1; needed: an integer from 2 to {group.size}"):
        supernet.space.from_dict({**sizes, group.name: 1})
    with pytest.raises(WidthError, match="from 2 to"):
        convert(model, image, min=1)
