"""What a forward stores is read in its code, that of the methods that it calls included."""

import torch
from torch import nn

from timm_autoslim.utils.forwards import list_stored_names


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = self.ready = self.size = self.calls = self.mode = self.inner = 0

    def forward(self, x):
        self.calls += 1
        return self.measure(x)

    def measure(self, x):
        def keep():
            self.inner = 1

        keep()
        self.size = x.shape
        return x

    def set_mode(self, mode):
        self.mode = mode


class Net(Base):
    @torch.no_grad()
    def forward(self, x):
        self.ready = True
        return super().forward(x) * self.scale


def test_a_forward_and_what_it_calls_are_read():
    assert list_stored_names(Base) == {"calls", "size", "inner"}
    assert list_stored_names(Net) == {"calls", "size", "inner", "ready"}
    assert list_stored_names(Net) is list_stored_names(Net)


def test_modules_of_torch_store_no_settings():
    for kind in (nn.BatchNorm2d, nn.LSTM, nn.MultiheadAttention, nn.Module):
        assert not list_stored_names(kind)
