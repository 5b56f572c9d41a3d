"""Tensors that a forward computes once and keeps: subnets compute with right ones."""

import copy

import pytest
import torch
from helpers.models import randomise
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert

IMAGE = torch.zeros(1, 3, 6, 6)


class Keeping(nn.Module):
    """A layer that multiplies its input by what it computed once of its weight."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, 1, 1))
        self.matrix = nn.Parameter(torch.rand(channels, channels) / channels)
        self._w, self.table, self.pair, self.memory = None, None, None, {}
        self.register_buffer("buffer", None, persistent=False)

    def compute(self):
        return self.weight.softmax(0)

    def forward(self, x):
        return x * self.get(x)


class OnNone(Keeping):
    def get(self, x):
        if self._w is None:
            self._w = self.compute()
        return self._w


class OnMissing(Keeping):
    def get(self, x):
        if not hasattr(self, "cached"):
            self.cached = self.compute()
        return self.cached


class Detached(Keeping):
    def get(self, x):
        if self.table is None:
            with torch.no_grad():
                self.table = self.compute().clone()
        return self.table


class Buffer(Keeping):
    def get(self, x):
        if self.buffer is None:
            self.buffer = self.compute().detach()
        return self.buffer


class Pair(Keeping):
    def get(self, x):
        if self.pair is None:
            self.pair = (self.compute(), self.weight.mean())
        return self.pair[0] * self.pair[1]


class PrivateDict(Keeping):
    def __init__(self, channels):
        super().__init__(channels)
        self._memory = {}

    def get(self, x):
        if "w" not in self._memory:
            self._memory["w"] = self.compute()
        return self._memory["w"]


class Dict(Keeping):
    def get(self, x):
        if "w" not in self.memory:
            self.memory["w"] = self.compute()
        return self.memory["w"]


class Reduced(Keeping):
    """What it keeps has no channels of its own."""

    def get(self, x):
        if self._w is None:
            self._w = self.weight.sum()
        return self._w * self.weight


class Summed(Keeping):
    def get(self, x):
        if self._w is None:
            self._w = self.matrix.sum(1)[:, None, None]
        return self._w * self.weight


class EvalOnly(Keeping):
    def get(self, x):
        if self.training:
            return self.compute()
        if self._w is None:
            self._w = self.compute()
        return self._w


class InList(Keeping):
    def __init__(self, channels):
        super().__init__(channels)
        self.memory_list = []

    def get(self, x):
        if not self.memory_list:
            self.memory_list.append(self.compute())
        return self.memory_list[0]


class ByProperty(Keeping):
    @property
    def scale(self):
        if self._w is None:
            self._w = self.compute()
        return self._w

    def get(self, x):
        return self.scale


class Constant(Keeping):
    """What it keeps follows from its size."""

    def get(self, x):
        if self._w is None:
            self._w = torch.linspace(0, 1, x.shape[1], device=x.device)[:, None, None]
        return self._w * self.weight


class EachTime(Keeping):
    def get(self, x):
        self._w = self.compute()
        return self._w


class Activation(Keeping):
    def get(self, x):
        self.last = x.mean()
        return self.weight


class Nothing(Keeping):
    def get(self, x):
        return self.compute()


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.stem, self.layer, self.inner = nn.Conv2d(3, 8, 3), layer(8), nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.inner(self.layer(self.stem(x)).relu()).relu().mean((2, 3)))


FIXING = [OnNone, OnMissing, Detached, Buffer, Pair, PrivateDict, Reduced, Summed, EvalOnly, InList, ByProperty]
FREE = [Dict, EachTime, Activation, Nothing]


def run_by_hand(model, images, widths):
    """Compute what a network of these widths computes: the layer gets its slice, and computes afresh."""
    a, b = (dict(widths.to_dict()).get(n, size) for n, size in (("stem", 8), ("inner", 12)))
    layer = type(model.layer)(a)
    layer.load_state_dict({"weight": model.layer.weight[:a], "matrix": model.layer.matrix[:a, :a]})
    x = layer.eval()(F.conv2d(images, model.stem.weight[:a], model.stem.bias[:a])).relu()
    x = F.conv2d(x, model.inner.weight[:b, :a], model.inner.bias[:b]).relu().mean((2, 3))
    return F.linear(x, model.head.weight[:, :b], model.head.bias)


@pytest.mark.parametrize("when", ["fresh", "after a forward", "after a forward in training"])
@pytest.mark.parametrize("layer", [*FIXING, Constant, *FREE])
def test_subnets_compute_with_right_tensors(layer, when):
    model = randomise(Net(layer)).eval()
    images = torch.randn(2, 3, 6, 6)
    if when != "fresh":
        with torch.no_grad():
            model.train(when.endswith("training"))(images)
        model.eval()
    supernet = convert(model, IMAGE)
    with torch.no_grad():
        supernet(images)
        for seed in range(3):
            widths = supernet.space.sample(torch.Generator().manual_seed(seed))
            expected = run_by_hand(model, images, widths)
            torch.testing.assert_close(supernet(images, widths), expected)
            torch.testing.assert_close(supernet.extract(widths).eval()(images), expected)
    assert ("stem" in supernet.space.names) is (layer in FREE)
    assert "inner" in supernet.space.names


def test_the_reason_names_the_attribute_and_the_weight():
    supernet = convert(Net(OnNone), IMAGE)
    assert supernet.graph.fixed["stem.weight", 0] == "layer: its forward keeps _w, which it computes from layer.weight"


def test_converting_leaves_what_is_kept():
    model = Net(OnNone)
    model(IMAGE)
    before = model.layer._w
    convert(model, IMAGE)
    assert model.layer._w is before
    copy.deepcopy(model.eval().requires_grad_(False).stem)


def test_an_attribute_that_a_forward_needs_stays():
    """It is written, but not computed anew if it is missing."""

    class Average(Keeping):
        def __init__(self, channels):
            super().__init__(channels)
            self.average = torch.zeros(())

        def get(self, x):
            self.average = self.average * 0.9
            return self.weight + self.average

    assert set(convert(Net(Average), IMAGE).space.names) == {"stem", "inner"}
