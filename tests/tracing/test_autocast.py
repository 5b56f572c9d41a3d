"""Models that ask for autocast of their tensors' device convert: torch has none for the meta device."""

import threading

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


def test_torch_is_as_before_when_the_last_of_several_threads_has_left():
    before = torch.autocast.__init__
    entered, leave = threading.Event(), threading.Event()

    def stay():
        with accept_autocast_on_meta():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    with accept_autocast_on_meta():
        thread.start()
        entered.wait()
    assert not torch.autocast("meta", enabled=False)._enabled  # the thread is still inside
    leave.set()
    thread.join()
    assert torch.autocast.__init__ is before
    with pytest.raises(RuntimeError):
        torch.autocast("meta", enabled=False)
