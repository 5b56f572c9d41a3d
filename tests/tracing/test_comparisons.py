"""Sizes that a forward compares, and that differ at the widest, differ in every subnet."""

import pytest
import torch
from torch import nn

from timm_autoslim import convert

IMAGE = torch.zeros(1, 3, 8, 8)


class Compared(nn.Module):
    """A network of two widths that compares sizes in its forward."""

    def __init__(self, compare, a=8, b=12):
        super().__init__()
        self.compare, self.other = compare, 8
        self.a, self.b, self.head = nn.Conv2d(3, a, 1), nn.Conv2d(a, b, 1), nn.Linear(b, 5)

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x).relu()
        return self.head((y if self.compare(self, x, y) else 2 * y).mean((2, 3)))


@pytest.mark.parametrize(
    ("compare", "sizes", "names"),
    [
        (lambda s, x, y: x.shape[1] == y.shape[1], (8, 12), {"a"}),
        (lambda s, x, y: x.shape[1] != y.shape[1], (12, 8), {"b"}),
        (lambda s, x, y: x.shape[1] < y.shape[1], (8, 12), {"a"}),
        (lambda s, x, y: x.shape[1] >= y.shape[1], (8, 12), {"a"}),
        (lambda s, x, y: s.a.out_channels > s.b.out_channels, (12, 8), {"b"}),
        (lambda s, x, y: x.shape[1] == y.shape[1] + x.shape[1], (8, 12), set()),
        (lambda s, x, y: x.shape[1] == 2 * x.shape[1], (8, 12), {"a", "b"}),
        (lambda s, x, y: s.other == y.shape[1], (8, 12), {"a"}),
        (lambda s, x, y: s.other == x.shape[1] // 2, (8, 12), {"a", "b"}),
    ],
)
def test_the_larger_one_stays(compare, sizes, names):
    if names:
        assert set(convert(Compared(compare, *sizes), IMAGE).space.names) == names
    else:
        with pytest.raises(ValueError, match="the code compares their number with another that may become equal"):
            convert(Compared(compare, *sizes), IMAGE)
