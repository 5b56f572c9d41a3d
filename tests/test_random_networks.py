"""What must hold for every network, on networks that nobody has thought of: random blocks, channels and widths."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo import assert_same, randomise, snapshot

from timm_autoslim import convert, cost
from timm_autoslim.importance import reordered
from timm_autoslim.slicing import take

IMAGES = (2, 3, 8, 8)
EXACT = 1e-10  # float64: a permutation changes only the order of sums


def layer(fan_in, fan_out, norm="batch", kernel=3, **given):
    """A convolution, a norm of the kind that is asked for, and a ReLU."""
    norms = {
        "batch": [nn.BatchNorm2d(fan_out)],
        "group": [nn.GroupNorm(2 if fan_out % 2 == 0 else 1, fan_out)],
        "none": [],
    }
    conv = nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=norm != "batch", **given)
    return nn.Sequential(conv, *norms[norm], nn.ReLU(inplace=True))


class Block(nn.Module):
    """A block has `fan_out` channels, which it works out from those that it is given."""

    def __init__(self, fan_in, size, norm):
        super().__init__()
        self.fan_out = fan_in
        self.make(fan_in, size, norm)


class Straight(Block):
    def make(self, fan_in, size, norm):
        self.layer, self.fan_out = layer(fan_in, size, norm), size

    def forward(self, x):
        return self.layer(x)


class Residual(Block):
    def make(self, fan_in, size, norm):
        self.inner, self.outer = layer(fan_in, size, norm, 1), layer(size, fan_in, norm)

    def forward(self, x):
        return x + self.outer(self.inner(x))


class Projected(Block):
    def make(self, fan_in, size, norm):
        self.main, self.shortcut = layer(fan_in, size, norm), nn.Conv2d(fan_in, size, 1, bias=False)
        self.fan_out = size

    def forward(self, x):
        return F.relu(self.main(x) + self.shortcut(x))


class Inverted(Block):
    """Wide, depthwise, narrow, with a squeeze-and-excite gate in the middle."""

    def make(self, fan_in, size, norm):
        wide = 2 * size
        self.widen, self.depth = layer(fan_in, wide, norm, 1), layer(wide, wide, norm, groups=wide)
        self.down, self.up = nn.Conv2d(wide, max(2, size // 2), 1), nn.Conv2d(max(2, size // 2), wide, 1)
        self.narrow = nn.Conv2d(wide, fan_in, 1)

    def forward(self, x):
        y = self.depth(self.widen(x))
        y = y * self.up(self.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.narrow(y)


class Dense(Block):
    def make(self, fan_in, size, norm):
        self.new, self.fan_out = layer(fan_in, size, norm), fan_in + size

    def forward(self, x):
        return torch.cat([x, self.new(x)], 1)


class Branches(Block):
    def make(self, fan_in, size, norm):
        self.one, self.two = layer(fan_in, size, norm, 1), layer(fan_in, size + 1, norm)
        self.fan_out = 2 * size + 1 + fan_in

    def forward(self, x):
        return torch.cat([self.one(x), F.max_pool2d(x, 3, 1, 1), self.two(x)], 1)


class Grouped(Block):
    """A grouped convolution, of few wide groups or of many narrow ones."""

    def make(self, fan_in, size, norm):
        groups, each = (2, size) if size % 2 else (size, 2)
        self.fan_out = groups * each
        self.into = layer(fan_in, self.fan_out, norm, 1)
        self.grouped = layer(self.fan_out, self.fan_out, norm, groups=groups)

    def forward(self, x):
        return self.grouped(self.into(x))


class Gate(Block):
    def make(self, fan_in, size, norm):
        self.wide, self.fan_out = nn.Conv2d(fan_in, 2 * size, 1), size

    def forward(self, x):
        value, gate = self.wide(x).chunk(2, 1)
        return value * gate.sigmoid()


class Separable(Block):
    def make(self, fan_in, size, norm):
        self.depth, self.point = layer(fan_in, fan_in, norm, groups=fan_in), layer(fan_in, size, norm, 1)
        self.fan_out = size

    def forward(self, x):
        return self.point(self.depth(x))


BLOCKS = [Straight, Residual, Projected, Inverted, Dense, Branches, Grouped, Gate, Separable]


class Network(nn.Module):
    def __init__(self, stem, blocks, hidden):
        super().__init__()
        self.stem = layer(3, stem)
        self.blocks = nn.Sequential()
        for kind, size, norm in blocks:
            self.blocks.append(kind(stem, size, norm))
            stem = self.blocks[-1].fan_out
        # with a hidden layer the head reads a flattened map of 2 x 2 pixels, else the mean
        self.hidden = nn.Linear(4 * stem, hidden) if hidden else None
        self.head = nn.Linear(hidden or stem, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))  # (N, C, H, W)
        if self.hidden is None:
            return self.head(x.mean((2, 3)))
        return self.head(self.hidden(torch.flatten(F.adaptive_avg_pool2d(x, 2), 1)).relu())


sizes = st.integers(2, 9)
networks = st.builds(
    Network,
    stem=sizes,
    blocks=st.lists(st.tuples(st.sampled_from(BLOCKS), sizes, st.sampled_from(["batch", "group", "none"])), max_size=5),
    hidden=st.sampled_from([0, 6]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks, st.data())
@torch.no_grad()
def test_every_network_is_sliced_right(model, data):
    torch.manual_seed(0)
    randomise(model).eval()
    images = torch.randn(IMAGES)
    before = snapshot(model)
    supernet = convert(model, images[:1])
    assert_same(before, snapshot(model))
    space = supernet.space
    assert torch.equal(supernet(images, space.max()), model(images))

    widths = space.from_dict({g.name: data.draw(st.integers(1, g.size), label=g.name) for g in space.groups})
    plain = supernet.extract(widths)
    with FlopCounterMode(display=False) as counter:
        separate = plain(images)
    assert torch.equal(supernet(images, widths), separate)
    found = cost(supernet, widths)
    assert found.params == sum(p.numel() for p in plain.parameters())
    assert 2 * found.macs * len(images) == counter.get_total_flops()
    assert_same(before, snapshot(model))

    double = supernet.extract().double()
    permuted = reordered(double, supernet.graph, "random")
    torch.testing.assert_close(permuted(images.double()), double(images.double()), rtol=EXACT, atol=EXACT)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks, st.data())
def test_every_network_is_trained_right(model, data):
    """In training mode, a step through the supernet moves the kept weights as a step of the extracted model does."""
    torch.manual_seed(0)
    randomise(model).train()
    images = torch.randn(IMAGES)
    supernet = convert(model, images[:1])
    space = supernet.space
    widths = space.from_dict({g.name: data.draw(st.integers(1, g.size), label=g.name) for g in space.groups})
    plain = supernet.extract(widths)
    plain(images).square().mean().backward()
    supernet(images, widths).square().mean().backward()
    kept = supernet._slices(widths).tensors
    for name, parameter in plain.named_parameters():
        whole = supernet.model.get_parameter(name).grad
        axes = kept.get(name, (None,) * whole.dim())
        assert torch.equal(take(whole, axes), parameter.grad), name
        assert whole.count_nonzero() == parameter.grad.count_nonzero(), name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks)
def test_every_channel_of_every_network_can_be_slimmed(model):
    """Nothing but the input, the output and the kernels may be fixed, nor may a conversion need a repair."""
    supernet = convert(model, torch.zeros(IMAGES))
    allowed = (
        "a channel of the model's input", "an output of the model", "the size of a kernel",
        "the channels of one group; whole groups are removed instead",
    )  # fmt: skip
    assert not {place: r for place, r in supernet.graph.fixed.items() if not r.endswith(allowed)}
    assert supernet._trace.repairs == []
