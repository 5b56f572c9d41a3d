"""Channels that a forward makes itself, of a constant: a subnet makes as many as it has, at the right places."""

import pytest
import torch
from helpers.masked import check_masked
from helpers.models import randomise
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert
from timm_autoslim.errors import NothingToSlimError
from timm_autoslim.supernet.order import reorder_channels


class Padded(nn.Module):
    """A residual block with more channels than its input, to which the shortcut adds zeros."""

    def __init__(self, pad, extra=(8, 8)):
        super().__init__()
        self.extra, self.before, self.channels, self.inner = (0, 0, 0, 0, *extra), extra[0], 16 + sum(extra), 16
        self.pad = [pad]
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16))
        self.conv = nn.Sequential(nn.Conv2d(16, self.channels, 3, padding=1), nn.BatchNorm2d(self.channels))
        self.head = nn.Linear(self.channels, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.conv(x) + F.pad(x, self.pad[0](self, x))).relu().mean((2, 3)))


PADS = {
    "a tuple": (lambda m, x: m.extra, (8, 8)),
    "numbers": (lambda m, x: (0, 0, 0, 0, m.before, m.extra[5]), (8, 4)),
    "one side": (lambda m, x: m.extra, (0, 8)),
    "the same number": (lambda m, x: (0, 0, 0, 0, m.before, m.before), (8, 8)),
    "as many as there are": (lambda m, x: (0, 0, 0, 0, 0, x.shape[1]), (0, 16)),
    "a difference of attributes": (lambda m, x: (0, 0, 0, 0, 0, m.channels - m.inner), (0, 8)),
    "a difference from its channels": (lambda m, x: (0, 0, 0, 0, 0, m.channels - x.shape[1]), (0, 8)),
}


WIDTHS = {
    "a tuple": {"stem.0": 16, "conv.0": 8, "conv.0:2": 8},
    "numbers": {"stem.0": 16, "conv.0": 8, "conv.0:2": 4},
    "as many as there are": {"stem.0": 16},
}


@pytest.mark.parametrize("name", PADS)
def test_a_pad_adds_as_many_channels_as_a_subnet_has(name):
    torch.manual_seed(0)
    model, images = randomise(Padded(*PADS[name])).eval(), torch.randn(2, 3, 5, 5)
    supernet = convert(model, images).eval()
    check_masked(supernet, images)
    assert supernet.space.max().to_dict() == WIDTHS.get(name, {"stem.0": 16, "conv.0": 8})


class Identity(nn.Module):
    """Adds an identity matrix to the products of its channels with each other."""

    def __init__(self, size):
        super().__init__()
        self.channels, self.size = 16, [size]
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2)  # (N, C, H * W)
        gram = x @ x.transpose(1, 2) / x.shape[2]
        eye = self.size[0](self, x)
        return self.head((gram * (1 - eye) @ (x + eye @ x)).mean(2))


EYES = {
    "its channels": lambda m, x: torch.eye(x.shape[1]),
    "by name": lambda m, x: torch.eye(n=x.shape[1]),
    "rows and columns": lambda m, x: torch.eye(x.shape[1], x.shape[1], dtype=x.dtype),
    "an attribute": lambda m, x: torch.eye(m.channels, device=x.device),
    "an attribute and its channels": lambda m, x: torch.eye(m.channels, x.shape[1]),
}
FIXED_EYES = {
    "a constant": (lambda m, x: torch.eye(16), "mul combines these channels with a dimension that cannot shrink"),
    "a constant beside its channels": (lambda m, x: torch.eye(x.shape[1], 16), "eye combines these channels"),
    "a part": (lambda m, x: torch.eye(x.shape[1], 20)[:, :16], "eye makes as many rows and columns as it is told"),
}


@pytest.mark.parametrize("name", EYES)
def test_an_identity_matrix_is_as_wide_as_a_subnet(name):
    torch.manual_seed(0)
    model, images = randomise(Identity(EYES[name])).eval(), torch.randn(2, 3, 5, 5)
    supernet = convert(model, images).eval()
    check_masked(supernet, images)
    assert supernet.space.max().to_dict() == {"stem": 16}


@pytest.mark.parametrize("name", FIXED_EYES)
def test_an_identity_matrix_of_another_size_fixes_channels(name):
    make, reason = FIXED_EYES[name]
    with pytest.raises(NothingToSlimError, match=reason):
        convert(Identity(make).eval(), torch.randn(2, 3, 5, 5))


class Mixing(nn.Module):
    """Mixes channels by a matrix that it makes of smaller ones."""

    def __init__(self, make, channels):
        super().__init__()
        self.make = [make]
        self.first, self.second = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(8, 10))
        self.stem, self.last = nn.Conv2d(3, channels[1], 1), nn.Conv2d(channels[0], 5, 1)

    def forward(self, x):
        return self.last(torch.einsum("nihw,oi->nohw", self.stem(x), self.make[0](self))).mean((2, 3))


MATRICES = {
    "block_diag": (torch.block_diag, (12, 16), {"stem": 6, "stem:2": 10, "first": 4, "second": 8}),
    "kron": (torch.kron, (32, 60), {"stem": 10, "second": 8}),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_that_is_made_of_others_shrinks_as_they_do(name):
    torch.manual_seed(0)
    function, channels, widths = MATRICES[name]
    model = randomise(Mixing(lambda m: function(m.first, m.second), channels)).eval()
    images = torch.randn(2, 3, 5, 5)
    supernet = convert(model, images).eval()
    assert supernet.space.max().to_dict() == widths
    check_masked(supernet, images)


TRIANGLES = {
    "tril": lambda x: x.tril(),
    "tril below the diagonal": lambda x: torch.tril(x, -1),
    "triu": lambda x: torch.triu(x),
    "triu above the diagonal": lambda x: x.triu(1),
    "of ones": lambda x: x * torch.ones_like(x).tril(),
    "both": lambda x: x.tril(-1) + torch.eye(x.shape[0], dtype=x.dtype) @ x.triu(),
}


class Triangle(Mixing):
    def __init__(self, function):
        super().__init__(lambda m: function(m.square), (12, 12))
        self.square = nn.Parameter(torch.randn(12, 12))


@pytest.mark.parametrize("name", TRIANGLES)
def test_a_part_of_a_triangle_is_a_triangle(name):
    torch.manual_seed(0)
    model, images = randomise(Triangle(TRIANGLES[name])).eval().double(), torch.randn(2, 3, 5, 5).double()
    supernet = convert(model, images).eval()
    assert supernet.space.max().to_dict() == {"stem": 12}
    check_masked(supernet, images)
    reordered = reorder_channels(model, supernet.graph, "random")
    torch.testing.assert_close(reordered(images), model(images))


@pytest.mark.parametrize("function", [lambda x: x.tril(1), lambda x: x.triu(-1)], ids=["tril", "triu"])
def test_a_triangle_beside_the_diagonal_fixes_channels(function):
    with pytest.raises(NothingToSlimError, match="depends on the place of these channels"):
        convert(Triangle(function).eval(), torch.randn(2, 3, 5, 5))
