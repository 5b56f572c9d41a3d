"""The choice among traces: the one that can remove most, or the reason why nothing can go."""

import pytest
import torch
from helpers.bodies import IMAGE, Around, conv
from helpers.models import randomise
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import NothingToSlimError


def test_nothing_left_to_slim_names_what_is_in_the_way():
    with pytest.raises(
        NothingToSlimError, match=r"what is in the way: .*the model: the operator aten\.rot90 has no rule"
    ):
        convert(Around(lambda s, x: torch.rot90(x, 1, (2, 3))), IMAGE)


class Skipping(nn.Module):
    """Group norms of four groups over 16 channels, over 8, and over both side by side, of which 6 are in a group."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = conv(3, 16), conv(16, 8), conv(24, 4)
        self.norm_a, self.norm_b, self.norm = nn.GroupNorm(4, 16), nn.GroupNorm(4, 8), nn.GroupNorm(4, 24)

    def forward(self, x):
        a = self.norm_a(self.a(x)).relu()
        b = self.norm_b(self.b(a)).relu()
        return self.last(self.norm(torch.cat([a, b], 1)).relu())


def test_group_norms_lose_an_equal_share_of_each_group_where_entire_groups_would_hold_all():
    torch.manual_seed(0)
    supernet = convert(randomise(Skipping()).eval(), IMAGE).eval()
    widths = supernet.space.uniform(0.5)
    assert widths.to_dict() == {"a": 1}
    slim, images = supernet.extract(widths), torch.randn(2, 3, 8, 8)
    assert [slim.norm.num_groups, slim.norm.num_channels] == [4, 12]
    assert torch.equal(slim(images), supernet(images, widths))
    for norm in ("norm_a", "norm_b", "norm"):  # as many of each group, so that a group of the subnet is a part of one
        channels = supernet.graph.shapes[f"{norm}.weight"][0]
        runs = supernet.graph.slices(widths.values_).tensors[f"{norm}.weight"][0]
        kept = [i for start, length in runs for i in range(start, start + length)]
        assert [i * 4 // channels for i in kept] == [i * 4 // len(kept) for i in range(len(kept))]
