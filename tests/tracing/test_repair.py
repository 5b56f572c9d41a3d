"""What disagrees with the proof is fixed with the reason, gets a floor, or is refused."""

import pytest
import timm
import torch
from helpers.bodies import IMAGE, Around, conv, convert_around
from helpers.models import randomise
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import NothingToSlimError, TraceError, WidthError
from timm_autoslim.tracing.prove import Disagreement
from timm_autoslim.tracing.repair import repair


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
    (reason,) = supernet.repairs
    assert reason.startswith(message)
    assert supernet.graph.fixed["switch.conv.weight", 0] == reason
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


class Failing:
    """Stands for a prover whose subnets always fail, each at a new set of channels."""

    def __init__(self, labels):
        self.records, self.labels = (), iter(labels)

    def find_faults(self, graph):
        yield Disagreement("it fails", "a", labels=next(self.labels))


def test_a_subnet_that_fails_whatever_is_frozen_is_refused():
    graph = convert_around(lambda s, x: s.a(x), 8, a=conv(8, 8)).graph
    with pytest.raises(TraceError, match=r"a subnet that fails whatever is frozen \(a: in a subnet, it fails\)"):
        repair(graph, Failing([[]]))


def test_repairs_come_to_an_end(monkeypatch):
    monkeypatch.setattr("timm_autoslim.tracing.repair.MAX_REPAIRS", 3)
    layers = {f"a{n}": conv(2, 2) for n in range(3)}

    def body(s, x):
        x = s.narrow(x)
        for name in layers:
            x = getattr(s, name)(x).relu()
        return x

    graph = convert_around(body, 2, narrow=conv(8, 2), **layers).graph
    labels = [[graph.observations.vectors[f"{name}.weight", 0]] for name in layers]
    with pytest.raises(TraceError, match=r"subnets that still fail after 3 repairs \(the last: a: in a"):
        repair(graph, Failing(labels))


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
