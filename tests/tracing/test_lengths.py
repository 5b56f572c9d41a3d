"""Lengths and places of cuts that a forward computes from sizes: a subnet cuts where the graph says, or stays wide.

Shapes do not show a cut at another place if the parts are joined again. So channels that a subnet lacks are made zero
in the model itself: its outputs are then those of the subnet, if all layers have the channels that they should.
"""

import math

import pytest
import torch
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import NothingToSlimError


def swap(x, bound):
    return torch.cat([x[:, bound:], x[:, :bound]], 1)


def in_groups(x, *sizes):
    return x.reshape(len(x), *sizes, 4, 4).transpose(1, 2).flatten(1, 2)


FOLLOWING = {
    "quarter": lambda x: swap(x, x.shape[1] // 4),
    "quarter at the end": lambda x: swap(x, -(x.shape[1] // 4)),
    "all but a quarter": lambda x: swap(x, x.shape[1] - x.shape[1] // 4),
    "equal parts": lambda x: torch.cat(x.tensor_split(4, 1)[::-1], 1),
    "hsplit": lambda x: torch.cat(torch.hsplit(x, 2)[::-1], 1),
    "parts at places": lambda x: torch.cat(x.tensor_split([x.shape[1] // 4, 3 * (x.shape[1] // 4)], 1)[::-1], 1),
    "parts at a place from the end": lambda x: torch.cat(x.tensor_split([-(x.shape[1] // 4)], 1)[::-1], 1),
    "hsplit at a place": lambda x: torch.cat(x.hsplit([x.shape[1] // 4])[::-1], 1),
    "rolled by a half": lambda x: torch.roll(x, x.shape[1] // 2, 1),
    "rolled by a quarter": lambda x: torch.roll(x, (1, x.shape[1] // 4), (3, 1)),
    "groups of a norm": lambda x: nn.functional.group_norm(x, x.shape[1] // 8),
    "groups and the rest": lambda x: in_groups(x, x.shape[1] // 4, -1),
    "the rest and groups": lambda x: in_groups(x, -1, x.shape[1] // 4),
    "shuffled groups": lambda x: nn.functional.channel_shuffle(x, x.shape[1] // 4),
}
OTHER = {
    "shift": lambda x: swap(x, x.shape[1] >> 2),
    "rounded up": lambda x: swap(x, -(-x.shape[1] // 3)),
    "remainder": lambda x: swap(x, x.shape[1] % 5),
    "inverse": lambda x: swap(x, 64 // x.shape[1]),
    "rounded to a multiple": lambda x: swap(x, 2 * (x.shape[1] // 8)),
    "sum of parts": lambda x: swap(x, sum([x.shape[1] // 8, x.shape[1] // 8])),
    "square": lambda x: swap(x, x.shape[1] * x.shape[1] // 64),
    "root": lambda x: swap(x, math.isqrt(x.shape[1])),
    "difference from a constant": lambda x: swap(x, 40 - x.shape[1]),
    "rolled by a remainder": lambda x: torch.roll(x, x.shape[1] % 5, 1),
    "unequal parts": lambda x: torch.cat(x.tensor_split(3, 1)[::-1], 1),
    "parts at a size": lambda x: torch.cat(x.tensor_split([x.shape[1] >> 1], 1)[::-1], 1),
}


class Cutting(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.cut = [cut]
        self.first, self.inner, self.last = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 24, 1), nn.Conv2d(32, 4, 1)
        self.back = nn.Conv2d(24, 32, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.cut[0](x + self.back(self.inner(x)).relu())).mean((2, 3))


@torch.no_grad()
def check_wiring(model, supernet, widths, images):
    """Compare a subnet with the model without the channels that the subnet lacks."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.first.bias.copy_(torch.arange(32.0))
    kept = supernet.extract(widths).first.bias.long()
    model.load_state_dict(before)
    lacking = torch.ones(32, dtype=torch.bool)
    lacking[kept] = False
    for layer in (model.first, model.back):
        layer.weight[lacking] = 0
        layer.bias[lacking] = 0
    model.inner.weight[:, lacking] = 0
    inner = torch.ones(24, dtype=torch.bool)
    inner[: widths.to_dict().get("inner", 24)] = False
    model.inner.weight[inner] = 0
    model.inner.bias[inner] = 0
    expected, outputs = model(images), supernet(images, widths)
    model.load_state_dict(before)
    torch.testing.assert_close(outputs, expected)
    assert torch.equal(supernet.extract(widths)(images), outputs)


@pytest.mark.parametrize("name", [*FOLLOWING, *OTHER])
def test_a_subnet_cuts_where_its_weights_are_cut(name):
    torch.manual_seed(0)
    model, images = Cutting(({**FOLLOWING, **OTHER})[name]).eval(), torch.randn(2, 3, 4, 4)
    supernet = convert(model, images).eval()
    generator = torch.Generator().manual_seed(0)
    for widths in (
        supernet.space.min(),
        supernet.space.uniform(0.6),
        *(supernet.space.sample(generator) for _ in "12"),
    ):
        check_wiring(model, supernet, widths, images)
    if name in FOLLOWING:
        assert len(supernet.space) == 2


def test_the_reason_names_the_place():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), Swap(), nn.Conv2d(32, 4, 1)).eval()
    with pytest.raises(
        NothingToSlimError, match=r"1: in a subnet, the code computes the length or place \d+ where \d+"
    ):
        convert(model, torch.randn(2, 3, 4, 4))


class Swap(nn.Module):
    def forward(self, x):
        return swap(x, x.shape[1] >> 2)


class Multiple(nn.Module):
    """Its channels are four times an attribute that no layer has."""

    def __init__(self, use):
        super().__init__()
        self.each, self.use = 8, [use]
        self.first, self.inner, self.last = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 24, 1), nn.Conv2d(32, 4, 1)
        self.back = nn.Conv2d(24, 32, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.use[0](self, x + self.back(self.inner(x)).relu())).mean((2, 3))


def check_multiple(model, x):
    assert x.shape[1] == 4 * model.each
    return x


MULTIPLES = {
    "view": lambda m, x: x.view(len(x), m.each * 4, 4, 4).relu(),
    "cut": lambda m, x: swap(x, 2 * m.each),
    "assert": check_multiple,
    "new": lambda m, x: x * torch.full((1, 4 * m.each, 1, 1), 2.0),
}


@pytest.mark.parametrize("use", MULTIPLES.values(), ids=MULTIPLES)
def test_channels_that_are_a_multiple_of_an_attribute_go_by_that_many(use):
    torch.manual_seed(0)
    model, images = Multiple(use).eval(), torch.randn(2, 3, 4, 4)
    supernet = convert(model, images).eval()
    assert "inner" in supernet.space.max().to_dict()
    assert "each" in supernet.graph.attributes
    for share in (0.1, 0.4, 0.7):
        check_wiring(model, supernet, supernet.space.uniform(share), images)


class Remainder(nn.Module):
    """Two sizes follow the channels that their difference counts; the smaller one must not become 0."""

    def __init__(self):
        super().__init__()
        self.channels, self.inner = 40, 8
        self.first, self.side, self.last = nn.Conv2d(3, 40, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(40, 4, 1)

    def forward(self, x):
        side = self.side(x)
        rest = x.new_zeros(len(x), self.channels - self.inner, *x.shape[2:])
        return self.last(self.first(x) + torch.cat([side, rest], 1)).mean((2, 3))


def test_no_width_makes_an_attribute_zero():
    model, images = Remainder().eval(), torch.randn(2, 3, 4, 4)
    supernet = convert(model, images, min={"side": 1, "first": 4}, divisor=1).eval()
    assert "the attribute inner, now 8, shrinks" in supernet.graph.floor_reasons[1]
    widths = supernet.space.min()
    assert widths.to_dict()["first"] == 4
    slim = supernet.extract(widths)
    assert (slim.inner, slim.channels) == (1, 5)
    assert torch.equal(slim(images), supernet(images, widths))


class Grouped(Multiple):
    """A convolution in groups, whose number the code computes."""

    def __init__(self, use):
        super().__init__(use)
        self.kernel = nn.Parameter(torch.randn(32, 4, 3, 3))


@pytest.mark.parametrize("count", [lambda m, x: x.shape[1] // 4, lambda m, x: m.each], ids=["computed", "attribute"])
def test_a_convolution_loses_entire_groups_if_their_number_follows_the_channels(count):
    torch.manual_seed(0)
    model = Grouped(lambda m, x: nn.functional.conv2d(x, m.kernel, padding=1, groups=count(m, x))).eval()
    images = torch.randn(2, 3, 4, 4)
    supernet = convert(model, images).eval()
    assert supernet.space.max().to_dict() == {"first": 8, "inner": 24}
    for share in (0.1, 0.4, 0.7):
        check_wiring(model, supernet, supernet.space.uniform(share), images)


class Joined(nn.Module):
    """Two branches side by side; the code compares their channels with a sum."""

    def __init__(self, count):
        super().__init__()
        self.count, self.channels = [count], [16, 24]
        self.a, self.b, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 24, 1), nn.Conv2d(40, 4, 1)

    def forward(self, x):
        parts = self.a(x), self.b(x)
        x = torch.cat(parts, 1)
        assert self.count[0](self, parts) == x.shape[1]
        return self.last(x).mean((2, 3))


SUMS = {
    "attributes": lambda model, parts: sum(model.channels),
    "tensors": lambda model, parts: sum(part.shape[1] for part in parts),
    "tensors in another order": lambda model, parts: parts[1].shape[1] + parts[0].shape[1],
    "both": lambda model, parts: model.channels[0] + parts[1].shape[1],
}


@pytest.mark.parametrize("count", SUMS.values(), ids=SUMS)
def test_a_sum_that_is_checked_leaves_each_part_its_own_width(count):
    model, images = Joined(count).eval(), torch.randn(2, 3, 4, 4)
    supernet = convert(model, images).eval()
    assert supernet.space.max().to_dict() == {"a": 16, "b": 24}
    widths = supernet.space.from_dict({"a": 8, "b": 18})
    slim = supernet.extract(widths)
    assert [slim.a.out_channels, slim.b.out_channels] == [8, 18]
    assert torch.equal(slim(images), supernet(images, widths))


def test_a_roll_by_an_attribute_moves_channels_by_a_fixed_distance():
    """As of the windows of a Swin: what is rolled keeps its place among what it is added to."""
    model = Multiple(lambda m, x: torch.roll(x, m.each, 1) + x).eval()
    supernet = convert(model, torch.randn(2, 3, 4, 4))
    assert supernet.space.max().to_dict() == {"inner": 24}
    assert "roll moves channels by a fixed distance" in supernet.graph.fixed["first.weight", 0]
