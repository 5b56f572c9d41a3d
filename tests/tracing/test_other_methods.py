"""Attributes that only other methods than the forward read follow the widths, and so those methods work."""

import copy

import pytest
import torch
from helpers.models import randomise
from timm.utils import reparameterize_model
from torch import nn

from timm_autoslim import convert
from timm_autoslim.tracing.other_methods import counts_channels, list_names_read


class Branches(nn.Module):
    """A depthwise or dense convolution and a BatchNorm in parallel, which become one convolution."""

    def __init__(self, cin, c_out, groups):
        super().__init__()
        self.cin, self.c_out, self.groups, self.kernel_size = cin, c_out, groups, 3
        self.conv = nn.Conv2d(cin, c_out, 3, padding=1, groups=groups)
        self.identity = nn.BatchNorm2d(cin) if cin == c_out else None
        self.fused = None

    def forward(self, x):
        if self.fused is not None:
            return self.fused(x)
        return self.conv(x) + (0 if self.identity is None else self.identity(x))

    def reparameterize(self):
        weight, bias = self.conv.weight.clone(), self.conv.bias.clone()
        if self.identity is not None:
            norm, each = self.identity, self.cin // self.groups
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            for i in range(self.cin):
                weight.data[i, i % each, 1, 1] += scale[i]
            bias = bias + norm.bias - norm.running_mean * scale
        self.fused = nn.Conv2d(self.cin, self.c_out, self.kernel_size, padding=1, groups=self.groups)
        self.fused.weight.data, self.fused.bias.data = weight.data, bias.data


class Norm(nn.Module):
    """A BatchNorm that becomes a depthwise convolution; no convolution tells how many groups that has."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.groups = dim, dim
        self.norm, self.fused = nn.BatchNorm2d(dim), None

    def forward(self, x):
        return self.norm(x) if self.fused is None else self.fused(x)

    def reparameterize(self):
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        self.fused = nn.Conv2d(self.dim, self.dim, 1, groups=self.groups)
        self.fused.weight.data = scale.detach().view(self.dim, self.dim // self.groups, 1, 1)
        self.fused.bias.data = (self.norm.bias - self.norm.running_mean * scale).detach()


class Head(nn.Module):
    """A classifier that can be replaced."""

    def __init__(self, in_dim, hidden_size, stages):
        super().__init__()
        self.in_dim, self.hidden_size, self.stage_dims = in_dim, hidden_size, stages
        self.inner, self.outer = nn.Linear(in_dim, hidden_size), nn.Linear(hidden_size, 5)

    def forward(self, x):
        return self.outer(self.inner(x.mean((2, 3))).relu())

    def reset(self, classes):
        self.inner = nn.Linear(self.in_dim, self.hidden_size)
        self.outer = nn.Linear(self.hidden_size, classes)

    def list_stages(self):
        return self.stage_dims


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), Norm(16)
        self.dense, self.depthwise, self.wide = Branches(16, 16, 1), Branches(16, 16, 16), Branches(16, 32, 1)
        self.grouped = Branches(32, 32, 2)
        self.head = Head(32, 24, [16, 32])

    def forward(self, x):
        x = self.depthwise(self.dense(self.norm(self.stem(x)).relu()).relu()).relu()
        return self.head(self.grouped(self.wide(x).relu()).relu())


def build():
    torch.manual_seed(0)
    return randomise(Net()).eval()


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_branches_of_a_narrow_model_fuse(share):
    images = torch.randn(2, 3, 8, 8)
    supernet = convert(build(), images[:1])
    slim = supernet.extract(supernet.space.uniform(share)).eval()
    with torch.no_grad():
        fused = reparameterize_model(slim)
        torch.testing.assert_close(fused(images), slim(images), rtol=1e-4, atol=1e-4)
    assert fused.dense.fused is not None
    assert slim.depthwise.groups == slim.depthwise.cin == slim.stem.out_channels
    assert slim.norm.groups == slim.norm.dim == slim.stem.out_channels
    assert (slim.dense.groups, slim.grouped.groups) == (1, slim.grouped.conv.groups)
    assert slim.dense.kernel_size == 3


def test_a_head_of_a_narrow_model_is_replaced():
    images = torch.randn(2, 3, 8, 8)
    supernet = convert(build(), images[:1])
    slim = supernet.extract(supernet.space.uniform(0.5)).eval()
    head = slim.head
    assert (head.in_dim, head.hidden_size) == (head.inner.in_features, head.outer.in_features) == (16, 12)
    assert head.stage_dims == [8, 16]
    other = copy.deepcopy(slim)
    other.head.reset(7)
    assert other(images).shape == (2, 7)


def test_names_that_only_the_forward_reads_are_left_to_the_trace():
    assert {"cin", "c_out", "groups", "kernel_size"} <= list_names_read(Branches)
    assert "stem" not in list_names_read(Net)
    assert list_names_read(nn.Conv2d) == frozenset()


@pytest.mark.parametrize("name", ["c", "c1", "cin", "in_chs", "dim_out", "hidden_size", "hiddenDim", "num_features"])
def test_names_that_count_channels(name):
    assert counts_channels(name)


@pytest.mark.parametrize("name", ["img_size", "kernel_size", "num_heads", "window", "feature_ends", "feat_ratio", "k"])
def test_names_that_count_something_else(name):
    assert not counts_channels(name)


class Ranking(nn.Module):
    """A head that ranks (query, class) pairs; inner scores are as many as the classes, and may be fewer."""

    def __init__(self, classes=16, **_):
        super().__init__()
        self.nc = classes
        self.inner, self.scores = nn.Linear(12, classes), nn.Linear(12, classes)
        self.reset()

    def reset(self):
        nn.init.constant_(self.scores.bias, 0.01 / self.nc)

    def forward(self, x):
        x = x * self.inner(x).amax(-1, keepdim=True)
        return self.rank(self.scores(x))

    def rank(self, scores):
        values, index = scores.flatten(1).topk(5)
        return torch.stack([values, torch.div(index, self.nc, rounding_mode="floor"), index % self.nc], -1)


def test_a_number_that_the_forward_reads_too_counts_what_the_trace_saw():
    model = randomise(nn.Sequential(nn.Linear(6, 12), Ranking()))
    rows = torch.randn(2, 7, 6)
    supernet = convert(model, rows)
    widths = supernet.space.min()
    slim = supernet.extract(widths)
    assert slim[1].inner.out_features < 16
    assert slim[1].nc == slim[1].scores.out_features == 16
    outputs = slim(rows)
    assert torch.equal(supernet(rows, widths), outputs)
    found = slim[1].scores(slim[0](rows) * slim[1].inner(slim[0](rows)).amax(-1, keepdim=True))
    picked = found[torch.arange(2)[:, None], outputs[..., 1].long(), outputs[..., 2].long()]
    assert torch.equal(picked, outputs[..., 0])


class Halves(nn.Module):
    """Splits its channels in two as ultralytics' C2f does; exporters take `forward_split` for its forward."""

    def __init__(self, channels, c):
        super().__init__()
        self.c = c
        self.wide, self.narrow = nn.Conv2d(channels, 2 * c, 1), nn.Conv2d(3 * c, channels, 1)
        self.inner = nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU(), nn.Conv2d(c, c, 1))  # the first is as wide as c

    def forward(self, x):
        parts = list(self.wide(x).chunk(2, 1))
        return self.narrow(torch.cat([*parts, self.inner(parts[-1])], 1))

    def forward_split(self, x):
        parts = list(self.wide(x).split((self.c, self.c), 1))
        return self.narrow(torch.cat([*parts, self.inner(parts[-1])], 1))

    def forward_failing(self, x):
        return x.view(self.c, 7)

    def forward_with_more(self, x, more):
        return x[:, : self.c] + more


def test_methods_that_take_the_place_of_a_forward_read_the_right_channels():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Halves(16, 8), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    images = torch.randn(2, 3, 8, 8)
    supernet = convert(model, images)
    generator = torch.Generator().manual_seed(0)
    for widths in (supernet.space.min(), *(supernet.space.sample(generator) for _ in range(4))):
        slim = supernet.extract(widths)
        expected = slim(images)
        slim[1].forward = slim[1].forward_split
        assert torch.equal(slim(images), expected)


class Heads(nn.Module):
    """Has a method that no other calls, and that puts channels into groups which the forward does not have."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.size = nn.Linear(8, 16), nn.Linear(16, 3), 16

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))

    def forward_heads(self, x):
        return self.first(x).view(len(x), 4, self.size // 4)


def test_attributes_that_only_another_method_reads_in_groups_stay():
    supernet = convert(Heads().eval(), torch.zeros(2, 8))
    for share in (0.75, 0.5, 0.25):
        slim = supernet.extract(supernet.space.uniform(share))
        assert slim.size == 16
        assert slim.first.out_features == 16 * share
