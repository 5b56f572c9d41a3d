"""Fourier transforms along positions, and deformable convolutions: their channels follow."""

import pytest
import torch
from helpers.conversions import Net, check_conversion, make_images
from helpers.models import randomise
from helpers.operators import aten, reasons, run_rule
from torch import nn
from torchvision.ops import DeformConv2d

from timm_autoslim import convert, cost


class Filter(nn.Module):
    """A filter of frequencies (H, W / 2 + 1, C), as in GFNet."""

    def __init__(self, channels=8, size=8):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size // 2 + 1, channels, 2) * 0.02)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)  # (N, H, W, C)
        y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.weight)
        return (x + torch.fft.irfft2(y, s=x.shape[1:3], dim=(1, 2), norm="ortho")).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    """As in FNet: the real part of a transform along positions."""

    def forward(self, x):
        return x + torch.fft.fft2(x, norm="ortho").real + torch.fft.ifft2(x).abs()


@pytest.mark.parametrize("layer", [Filter, Mixer])
def test_filters_of_frequencies_follow_the_channels(layer):
    model = Net(lambda s, x: s.logits(s.filter(s.maps(x))), filter=layer())
    supernet = check_conversion(randomise(model))
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}
    assert not supernet.repairs
    assert not supernet.unruled


def test_a_transform_along_channels_holds_them():
    model = Net(lambda s, x: s.logits(s.maps(x) + torch.fft.fft(s.maps(x), dim=1).real))
    supernet = check_conversion(randomise(model))
    assert supernet.space.max().to_dict() == {"inner": 16}


def test_a_transform_keeps_the_other_dimensions():
    outcome = run_rule(aten._fft_c2c.default, torch.empty(2, 6, 4, dtype=torch.complex64, device="meta"), [2], 0, True)
    assert reasons(outcome) == {"a Fourier transform treats this dimension as positions, not channels"}


class Deformable(nn.Module):
    def __init__(self, masked, groups=1):
        super().__init__()
        self.offset, self.mask = nn.Conv2d(8, 18, 3, padding=1), nn.Conv2d(8, 9, 3, padding=1) if masked else None
        self.conv = DeformConv2d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x):
        mask = None if self.mask is None else self.mask(x).sigmoid()
        return self.conv(x, self.offset(x), mask)


@pytest.mark.parametrize("masked", [False, True])
def test_a_deformable_convolution_follows_its_channels(masked):
    model = Net(lambda s, x: s.logits(s.part(s.maps(x))), part=Deformable(masked))
    model.head = nn.Linear(8, 10)
    supernet = check_conversion(randomise(model), count=False)  # torch's counter does not know the operator
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16, "part.conv": 8}
    assert not supernet.repairs
    slim = supernet.extract(supernet.space.uniform(0.5))
    assert slim.part.conv.weight.shape == (4, 4, 3, 3)
    assert (slim.part.conv.in_channels, slim.part.conv.out_channels) == (4, 4)
    assert slim.part.offset.weight.shape[:2] == (18, 4)
    products = [p for p in supernet.graph.products if p.path == "part.conv"]
    assert [p.constant for p in products] == [9 * 64]


def test_a_deformable_convolution_in_groups_keeps_its_channels():
    model = randomise(Net(lambda s, x: s.logits(s.part(s.maps(x))), part=Deformable(True, groups=2))).eval()
    supernet = convert(model, torch.zeros(1, 3, 8, 8))
    assert supernet.space.max().to_dict() == {"inner": 16}
    assert "in groups keeps all channels" in supernet.graph.fixed["part.conv.weight", 0]
    images, widths = make_images(), supernet.space.uniform(0.5)
    assert torch.equal(supernet(images, widths), supernet.extract(widths).eval()(images))
    assert cost(supernet, widths).macs < cost(supernet).macs
