"""The tracer, operator by operator on small networks, and against torch-pruning's dependency graph on real ones."""

import warnings

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import arbitrary_widths, randomise

from timm_autoslim import convert, cost
from timm_autoslim.errors import NothingToSlimError
from timm_autoslim.importance import reordered
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.trace import trace

IMAGE = torch.zeros(1, 3, 8, 8)
EXACT = 1e-10  # float64: rounding alone


def conv(fan_in, fan_out, kernel=1, **given):
    return nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, **given)


class Net(nn.Module):
    """A stem of 8 channels, a body that a test gives, and a head that reads `last` channels."""

    def __init__(self, body, last=8, **layers):
        super().__init__()
        self.stem = conv(3, 8)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = conv(last, 5)
        self.body = body

    def forward(self, x):
        return self.head(self.body(self, self.stem(x))).mean((2, 3))


def converted(body, last=8, **layers):
    """Convert a network around `body`, and check all that must hold of every conversion."""
    model = randomise(Net(body, last, **layers)).eval()
    supernet = convert(model, IMAGE)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(supernet(images), model(images))
        for seed in range(4):
            widths = arbitrary_widths(supernet.space, torch.Generator().manual_seed(seed))
            plain = supernet.extract(widths)
            assert torch.equal(supernet(images, widths), plain(images))
            assert cost(supernet, widths).params == sum(p.numel() for p in plain.parameters())
        double = supernet.extract().double()
        permuted = reordered(double, supernet.graph, "random")
        torch.testing.assert_close(permuted(images.double()), double(images.double()), rtol=EXACT, atol=EXACT)
    return supernet


def shuffled(self, x):
    x = self.wide(x)
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return self.after(x)


def gated(self, x):
    a, b = self.wide(x).chunk(2, 1)
    return a * b.sigmoid()


def squeezed(self, x):
    return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def concatenated(self, x):
    return self.join(torch.cat([x, self.side(x), x], 1))


def flattened(self, x):
    return self.linear(F.adaptive_avg_pool2d(x, 2).flatten(1))[:, :, None, None]


# body, channels before the head, its layers, and the width groups that must come out
CASES = {
    "sequence": (lambda s, x: s.a(x).relu(), 6, {"a": conv(8, 6, 3)}, {"stem": 8, "a": 6}),
    "residual": (lambda s, x: x + s.a(x), 8, {"a": conv(8, 8)}, {"stem": 8}),
    "residual of residuals": (
        lambda s, x: s.b(s.a(x) + x).relu() + x, 8, {"a": conv(8, 8), "b": conv(8, 8)}, {"stem": 8}
    ),
    "batch norm": (lambda s, x: s.bn(x), 8, {"bn": nn.BatchNorm2d(8)}, {"stem": 8}),
    "layer norm": (
        lambda s, x: s.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 8, {"ln": nn.LayerNorm(8)}, {"stem": 8}
    ),
    "depthwise": (lambda s, x: s.a(x), 8, {"a": conv(8, 8, 3, groups=8)}, {"stem": 8}),
    "depthwise with multiplier": (lambda s, x: s.a(x), 16, {"a": conv(8, 16, 3, groups=8)}, {"stem": 8}),
    "grouped, by a share of every group": (
        lambda s, x: s.a(x), 12, {"a": conv(8, 12, 3, groups=2)}, {"stem": 4, "a": 6}
    ),
    "grouped, by whole groups": (lambda s, x: s.a(x), 8, {"a": conv(8, 8, 3, groups=4)}, {"stem": 4}),
    "concatenation": (concatenated, 8, {"side": conv(8, 6), "join": conv(22, 8)}, {"stem": 8, "side": 6, "join": 8}),
    "chunk": (gated, 6, {"wide": conv(8, 12)}, {"stem": 8, "wide": 6}),
    "squeeze and excite": (squeezed, 8, {"down": conv(8, 4), "up": conv(4, 8)}, {"stem": 8, "down": 4}),
    "flatten": (flattened, 6, {"linear": nn.Linear(32, 6)}, {"stem": 8, "linear": 6}),
    "prelu": (lambda s, x: s.act(x), 8, {"act": nn.PReLU(8)}, {"stem": 8}),
    "flip": (lambda s, x: x.flip(1) + x, 8, {}, {"stem": 4}),
    "pooling": (lambda s, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2), 8, {}, {"stem": 8}),
    "reused layer": (lambda s, x: s.a(s.a(x).relu()), 8, {"a": conv(8, 8)}, {"stem": 8}),
    "transposed": (lambda s, x: s.a(x), 6, {"a": nn.ConvTranspose2d(8, 6, 2, 2)}, {"stem": 8, "a": 6}),
    "einsum": (lambda s, x: torch.einsum("nchw,dc->ndhw", x, s.a.weight), 6, {"a": nn.Linear(8, 6)}, None),
    "standardised weight": (
        lambda s, x: F.conv2d(x, s.a.weight - s.a.weight.mean((1, 2, 3), keepdim=True)), 6, {"a": conv(8, 6)}, None
    ),
    "group norm": (lambda s, x: s.gn(x), 8, {"gn": nn.GroupNorm(2, 8)}, {"stem": 4}),
    "one group norm": (lambda s, x: s.gn(x), 8, {"gn": nn.GroupNorm(1, 8)}, {"stem": 8}),
    "shuffle": (
        lambda s, x: shuffled(s, x), 8, {"wide": conv(8, 8), "after": conv(8, 8)}, {"stem": 8, "wide": 4, "after": 8}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_width_groups_of_an_operator(name):
    body, last, layers, groups = CASES[name]
    supernet = converted(body, last, **layers)
    if groups is not None:
        assert supernet.space.max().to_dict() == groups
    assert supernet._trace.repairs == []
