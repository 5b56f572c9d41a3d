"""Tensors that are data: tables that no module computes, and buffers that a module may compute again."""

import pytest
import torch
from helpers.bodies import conv, convert_around
from torch import nn

from timm_autoslim import convert


class Coordinates(nn.Module):
    """Holds a table that some models compute anew for another size of image."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.rand(9, 4), persistent=False)


def test_columns_of_a_table_are_frozen_and_nothing_else_is():
    supernet = convert_around(
        lambda s, x: x + s.read(s.grid.table).mean(0)[:, None, None], 8, grid=Coordinates(), read=nn.Linear(4, 8)
    )
    assert supernet.graph.fixed["read.weight", 1] == "the columns of a table that no module computes"
    assert supernet.space["stem"].size == 8


class Scaled(nn.Module):
    """Multiplies channels by a table that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(1.0, 9.0)[:, None, None], persistent=False)

    def forward(self, x):
        return x * self.table


class Recomputed(Scaled):
    """Computes its table again when it is moved."""

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.table = fn(torch.arange(1.0, 9.0)[:, None, None])
        return self


def test_a_table_that_its_module_may_compute_again_stays():
    kept = convert_around(lambda s, x: s.scaled(s.a(x)), 8, a=conv(8, 8), scaled=Scaled())
    assert kept.space.max().to_dict() == {"stem": 8, "a": 8}
    supernet = convert_around(lambda s, x: s.scaled(s.a(x)), 8, a=conv(8, 8), scaled=Recomputed())
    reason = "no checkpoint holds scaled.table, and its module may compute it again"
    assert supernet.graph.fixed["a.weight", 0] == reason
    assert supernet.space.max().to_dict() == {"stem": 8}


class Frequencies(nn.Module):
    """Frequencies of channels, as rotary tables have them, in a buffer that no checkpoint holds."""

    def __init__(self, dim, computed):
        super().__init__()
        self.dim, self.computed = dim, computed
        self.proj = nn.Linear(8, dim)
        self.register_buffer("frequency", torch.empty(dim), persistent=False)
        self.register_buffer("zeros", torch.empty(dim), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self):
        powers = torch.arange(self.dim, dtype=torch.float) / self.dim if self.computed else torch.ones(self.dim)
        self.frequency.copy_(powers)
        self.zeros.zero_()

    def forward(self, x):
        return self.proj(x) * self.frequency + self.zeros


@pytest.mark.parametrize("computed", [True, False])
def test_a_buffer_that_a_module_fills_with_other_numbers_stays(computed):
    model = nn.Sequential(nn.Linear(4, 8), Frequencies(16, computed), nn.Linear(16, 3))
    supernet = convert(model, torch.zeros(1, 4))
    slim, images = supernet.extract(supernet.space.uniform(0.5)), torch.randn(2, 4)
    before = slim(images)
    slim[1].init_non_persistent_buffers()
    assert torch.equal(slim(images), before)
    assert slim[1].frequency.shape == ((16,) if computed else (8,))
    if computed:
        assert "init_non_persistent_buffers" in supernet.graph.fixed["1.frequency", 0]
