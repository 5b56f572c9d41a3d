"""Models that ask for autocast of their tensors' device convert: torch has none for the meta device."""

import pytest
import torch
from torch import nn

from timm_autoslim import convert
from timm_autoslim.tracing.autocast import accept_autocast_on_meta

SPELLINGS = {
    "off": lambda device: torch.autocast(device, enabled=False),
    "off, by name": lambda device: torch.autocast(device_type=device, enabled=False),
    "amp's": lambda device: torch.amp.autocast(device, dtype=torch.bfloat16),
    "as it is": lambda device: torch.autocast(device, enabled=torch.is_autocast_enabled(device)),
    "of its type": lambda device: torch.autocast(device, torch.get_autocast_dtype(device)),
}


class Rotated(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.first, self.second, self.spelling = nn.Linear(6, 16), nn.Linear(16, 3), spelling

    def forward(self, x):
        x = self.first(x)
        with SPELLINGS[self.spelling](x.device.type):
            x = x * torch.arange(len(x), device=x.device)[:, None].cos()
        return self.second(x)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_model_under_autocast_of_its_own_device_converts(spelling):
    functions = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype
    images = torch.randn(2, 6)
    supernet = convert(Rotated(spelling).eval(), images).eval()
    assert [group.size for group in supernet.space.groups] == [16]
    widths = supernet.space.uniform(0.5)
    assert torch.equal(supernet(images, widths), supernet.extract(widths).eval()(images))
    assert functions == (torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype)


def test_torch_is_as_before_after_an_error():
    before = torch.autocast.__init__
    with pytest.raises(KeyboardInterrupt), accept_autocast_on_meta(), accept_autocast_on_meta():
        raise KeyboardInterrupt
    assert torch.autocast.__init__ is before
    with pytest.raises(RuntimeError):
        torch.autocast("meta", enabled=False)
