"""Checks of sizes, sizes in configurations, and sizes that became ordinary integers: they follow the channels."""

import collections
import dataclasses
import math
import types
from types import SimpleNamespace as Namespace

import pytest
import torch
from helpers.conversions import check_conversion
from helpers.models import randomise
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert, cost, load, save


class Block(nn.Module):
    """A layer that does something with the size of its input first."""

    def __init__(self, use, channels, out):
        super().__init__()
        self.use, self.channels, self.out = use, channels, out
        self.conv, self.norm = nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out)

    def forward(self, x):
        y = self.norm(self.conv(self.use(self, x)))
        return y.relu()


class Net(nn.Module):
    def __init__(self, use, widths=(8, 16, 12)):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, widths[0], 3, padding=1), nn.BatchNorm2d(widths[0])
        self.first, self.second = Block(use, *widths[:2]), Block(use, *widths[1:])
        self.head = nn.Linear(widths[2], 5)

    def forward(self, x):
        return self.head(self.second(self.first(self.bn(self.stem(x)).relu())).mean((2, 3)))


def check(holds):
    def use(self, x):
        if not holds(self, x):
            raise ValueError(x.shape)
        return x

    return use


CHECKS = {
    "equal": lambda s, x: x.shape[1] == s.channels,
    "unequal": lambda s, x: (x.shape[1] != s.channels) is False,
    "swapped": lambda s, x: s.channels == x.size(1),
    "a shape": lambda s, x: x.shape == (x.shape[0], s.channels, *x.shape[2:]),
    "a part of a shape": lambda s, x: tuple(x.shape[1:3]) == (s.channels, x.shape[2]),
    "a weight": lambda s, x: x.shape[1] == s.conv.weight.shape[1],
    "a layer": lambda s, x: x.shape[1] == s.conv.in_channels,
    "twice": lambda s, x: 2 * x.shape[1] == s.channels * 2,
    "half": lambda s, x: x.shape[1] // 2 == s.channels // 2,
    "attributes": lambda s, x: s.channels == s.conv.in_channels and x.reshape(len(x), s.channels, -1) is not None,
    "a product": lambda s, x: s.channels == s.conv.groups * s.conv.in_channels,
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_that_holds_follows_the_channels(name):
    supernet = check_conversion(randomise(Net(check(CHECKS[name]))))
    assert supernet.space.max().to_dict() == {"stem": 8, "first.conv": 16, "second.conv": 12}
    assert not supernet.repairs


def test_a_check_with_a_number_holds_the_channels():
    supernet = convert(Net(check(lambda s, x: x.shape[1] in (8, 16))), torch.zeros(1, 3, 8, 8))
    assert supernet.space.max().to_dict() == {"second.conv": 12}
    assert supernet.graph.fixed["stem.weight", 0].startswith("the code asks about their number at ")
    assert not supernet.repairs


class Shortcut(Block):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return (x + y if self.conv.in_channels == self.conv.out_channels else y).relu()


@pytest.mark.parametrize(
    ("widths", "fixed", "least"),
    [
        ((8, 16, 12), ["first.conv"], {}),
        ((16, 12, 8), ["stem"], {"first.conv": 9}),
        ((8, 8, 16), [], {"second.conv": 10}),  # a multiple of its divisor, 2
    ],
)
def test_sizes_that_differ_stay_different(widths, fixed, least):
    """Or a subnet would have a shortcut that the widest has not."""
    model = Net(None, widths)
    model.first, model.second = Shortcut(None, *widths[:2]), Shortcut(None, *widths[1:])
    supernet = check_conversion(randomise(model))
    assert not supernet.repairs
    assert not set(fixed) & set(supernet.space.max().to_dict())
    assert len(supernet.space) == len({"stem", "first.conv", "second.conv"} - set(fixed)) - (widths[0] == widths[1])
    assert {name: supernet.space.min()[name] for name in least} == least


def test_sizes_that_are_compared_as_keys_are_not_tied():
    tables = {}

    def use(self, x):
        return x * tables.setdefault(x.shape[1], 2)

    widths = (8, 8, 8)
    supernet = check_conversion(randomise(Net(use, widths)))
    assert supernet.space.max().to_dict() == {"stem": 8, "first.conv": 8, "second.conv": 8}


PLAIN = {
    "int": lambda s, x: x.reshape(len(x), int(x.shape[1]), -1).reshape(x.shape),
    "int of an attribute": lambda s, x: x.reshape(len(x), int(s.channels), -1).reshape(x.shape),
    "a list": lambda s, x: x.reshape([int(n) for n in x.shape[:2]] + [-1]).reshape(x.shape),
    "sum": lambda s, x: x.reshape(len(x), sum([s.channels]), -1).reshape(x.shape),
    "round": lambda s, x: flip_halves(x, round(x.shape[1] / 2)),
    "floor": lambda s, x: flip_halves(x, math.floor(x.shape[1] / 2)),
    "min": lambda s, x: x.reshape(len(x), min(x.shape[1], s.channels), -1).reshape(x.shape),
}


def flip_halves(x, half):
    return x.reshape(len(x), 2, half, *x.shape[2:]).flip(1).reshape(len(x), 2 * half, *x.shape[2:])


@pytest.mark.parametrize("name", PLAIN)
def test_an_ordinary_integer_of_a_size_keeps_its_origin(name):
    supernet = check_conversion(randomise(Net(PLAIN[name])))
    assert supernet.space.max().to_dict().keys() == {"stem", "first.conv", "second.conv"}
    assert not supernet.repairs


@pytest.mark.slow
def test_a_number_that_only_happens_to_be_the_size_is_found_out():
    def use(self, x):
        assert int(x.shape[1]) > 0
        return x.reshape(-1, 8, *x.shape[2:]).reshape(x.shape)  # 8 is the size in the first block alone

    supernet = convert(randomise(Net(use)).eval(), torch.zeros(2, 3, 8, 8)).eval()
    images = torch.randn(2, 3, 8, 8)
    for share in (0.5, 1.0):
        widths = supernet.space.uniform(share)
        assert torch.equal(supernet(images, widths), supernet.extract(widths).eval()(images))


# -- configurations ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    width: int = 16
    heads: int = 2
    hidden: int = 24


class Part(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def get(self, name):
        return self.config[name] if isinstance(self.config, dict) else getattr(self.config, name)


class Attention(Part):
    def __init__(self, config):
        super().__init__(config)
        self.qkv, self.out = nn.Linear(self.get("width"), 3 * self.get("width")), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).split(self.get("width"), 2)
        head = self.get("width") // self.get("heads")
        q, k, v = (t.view(*x.shape[:2], self.get("heads"), head).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], 16 // 16 * -1))


class Mlp(Part):
    def __init__(self, config):
        super().__init__(config)
        self.up, self.down = nn.Linear(16, self.get("hidden")), nn.Linear(self.get("hidden"), 16)

    def forward(self, x):
        x = F.gelu(self.up(x))
        assert x.shape[-1] == self.get("hidden")
        return self.down(x.view(*x.shape[:2], self.get("hidden")))


class Transformer(Part):
    def __init__(self, config):
        super().__init__(config)
        self.stem, self.bn = nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16)
        self.layers = nn.ModuleList([Attention(config), Mlp(config), Attention(config), Mlp(config)])
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).flatten(2).transpose(1, 2)
        assert x.shape[-1] == self.get("width")
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


CONFIGS = {
    "a dataclass": Config,
    "a namespace": lambda: types.SimpleNamespace(**vars(Config())),
    "a dict": lambda: dict(vars(Config())),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_in_a_configuration_that_modules_share_follow_the_channels(name):
    config = CONFIGS[name]()
    before = dict(config if isinstance(config, dict) else vars(config))
    supernet = check_conversion(randomise(Transformer(config)), count=False)
    assert (config if isinstance(config, dict) else vars(config)) == before
    assert cost(supernet, supernet.space.uniform(0.5)).macs < 0.35 * cost(supernet).macs
    slim = supernet.extract(supernet.space.uniform(0.5))
    configs = [module.config for module in slim.modules() if hasattr(module, "config")]
    assert all(other is configs[0] for other in configs)
    assert (configs[0]["hidden"] if isinstance(configs[0], dict) else configs[0].hidden) == 12


Named = collections.namedtuple("Named", ["width", "other"])


class Slotted:
    __slots__ = ("width",)

    def __init__(self):
        self.width = 16


class Private:
    def __init__(self):
        self._width = 16

    @property
    def width(self):
        return self._width


# By name: a configuration, and how a forward reads it.
DEEP = {
    "an object in an object": (
        lambda: Namespace(part=Namespace(part=Namespace(width=16))),
        lambda c: c.part.part.width,
    ),
    "a dict in a dict": (lambda: {"part": {"width": 16}}, lambda c: c["part"]["width"]),
    "a dict in an object": (lambda: Namespace(part={"width": 16}), lambda c: c.part["width"]),
    "a list in a list": (lambda: [[16, 3]], lambda c: c[0][0]),
    "an object in a list": (lambda: [Namespace(width=16)], lambda c: c[0].width),
    "a named tuple": (lambda: Named(16, 3), lambda c: c.width),
    "a named tuple in an object": (lambda: Namespace(part=Named(16, 3)), lambda c: c.part.width),
    "slots": (Slotted, lambda c: c.width),
    "an ordered dict": (lambda: collections.OrderedDict(width=16), lambda c: c["width"]),
    "a default dict": (lambda: collections.defaultdict(int, width=16), lambda c: c["width"]),
    "a private member": (Private, lambda c: c.width),
}


class Reshaping(nn.Module):
    def __init__(self, config, read):
        super().__init__()
        self.config, self.read, self.a, self.b = config, read, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.a(x).relu().reshape(x.shape[0], 1, -1)
        return self.b(x.reshape(x.shape[0], self.read(self.config)))


def make_deep(name):
    make, read = DEEP[name]
    config = make()
    return nn.Sequential(nn.Linear(5, 16), Reshaping(config, read), Reshaping(config, read), nn.Linear(16, 3))


@pytest.mark.parametrize("name", DEEP)
def test_sizes_deep_in_a_configuration_follow_and_are_saved(name, tmp_path):
    model, images, read = randomise(make_deep(name)).eval(), torch.randn(2, 5), DEEP[name][1]
    supernet = convert(model, torch.zeros(1, 5))
    assert not [reason for reason in supernet.graph.fixed.values() if "constant" in reason]
    assert not supernet.repairs
    half = supernet.space.uniform(0.5)
    slim = supernet.extract(half).eval()
    assert (read(slim[1].config), read(model[1].config)) == (8, 16)
    expected = slim(images)
    torch.testing.assert_close(supernet(images, half), expected)
    torch.testing.assert_close(load(save(slim, tmp_path / "slim"), make_deep(name)).eval()(images), expected)
