"""What the blocks of the property tests have in common. Nothing here draws random numbers."""

import torch
from torch import nn


def layer(fan_in, fan_out, norm="batch", kernel=3, **options):
    """A convolution, a norm of the kind that is asked for, and a ReLU."""
    norms = {
        "batch": [nn.BatchNorm2d(fan_out)],
        "group": [nn.GroupNorm(2 if fan_out % 2 == 0 else 1, fan_out)],
        "none": [],
    }
    conv = nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=norm != "batch", **options)
    return nn.Sequential(conv, *norms[norm], nn.ReLU(inplace=True))


class HandWrittenRMSNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class ChannelsFirst(nn.Module):
    """A norm over maps, for tokens."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def token_norm(kind, channels):
    """A norm over the channels of tokens; the kinds are those of `layer`."""
    if kind == "batch":
        return nn.LayerNorm(channels)
    if kind == "group":
        return ChannelsFirst(nn.GroupNorm(2 if channels % 2 == 0 else 1, channels))
    return nn.RMSNorm(channels) if channels % 2 else HandWrittenRMSNorm(channels)


class Block(nn.Module):
    """The base of all blocks.

    Attributes:
        form: "map" or "tokens".
        options: the variants by option, the simplest first.
        kept: (name of a tensor in the block, axis) of what is no channel, and so must stay.
    """

    def __init_subclass__(cls, form="map", kept=(), **options):
        cls.form, cls.kept, cls.options = form, kept, options

    def __init__(self, fan_in, size, norm, side, count, **options):
        super().__init__()
        self.fan_out, self.side, self.count = fan_in, side, count
        self.make(fan_in, size, norm, **options)
