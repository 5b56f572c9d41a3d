"""Networks of any mixture of blocks, for the property tests.

A block reads a map (N, C, H, W) or tokens (N, T, C), and works out what it gives: `fan_out` channels, maps of `side` x
`side` pixels, or `count` tokens. A block that splits channels into heads has `heads`. Nothing draws random numbers.
"""

import torch
from torch import nn
from torch.nn import functional as F

from helpers.blocks import maps as map_blocks
from helpers.blocks import tokens as token_blocks
from helpers.blocks.base import Block, layer

BLOCKS = [kind for room in (map_blocks, token_blocks) for kind in vars(room).values() if kind in Block.__subclasses__()]


def variants(kind):
    """Return the choices of a block's options that differ from the simplest in one of them."""
    first = {name: values[0] for name, values in kind.options.items()}
    return [first, *({**first, name: v} for name, values in kind.options.items() for v in values[1:])]


class ToTokens(nn.Module):
    kept = ()

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class ToMap(nn.Module):
    """The last `side` * `side` tokens become pixels; those before them are left out."""

    kept = ()

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, x):
        n, _, c = x.shape
        return x[:, -self.side * self.side :].transpose(1, 2).reshape(n, c, self.side, self.side)


class Network(nn.Module):
    """A convolution, any blocks in a row, and a head; between maps and tokens there and back as the blocks need it.

    Args:
        stem: channels of the first convolution.
        blocks: (class, size, kind of norm, options) of each block.
        hidden: 0, or the features of a hidden layer of the head, which then reads a flattened map of 2 x 2 pixels.
    """

    def __init__(self, stem, blocks, hidden, side=8):
        super().__init__()
        self.side = side
        self.stem = layer(3, stem)
        self.blocks = nn.Sequential()
        form, count = "map", 0
        for kind, size, norm, options in blocks:
            if kind is map_blocks.Unshuffled and side % 4:  # the head needs 2 x 2 pixels
                continue
            if kind.form != form:
                self.blocks.append(ToTokens() if kind.form == "tokens" else ToMap(side))
                form, count = kind.form, side * side
            self.blocks.append(kind(stem, size, norm, side, count, **options))
            stem, side, count = (getattr(self.blocks[-1], name) for name in ("fan_out", "side", "count"))
        if form == "tokens" and hidden:
            self.blocks.append(ToMap(side))
        self.has_heads = any(hasattr(block, "heads") for block in self.blocks)
        self.has_class_token = form == "tokens" and count > side * side
        self.hidden = nn.Linear(4 * stem, hidden) if hidden else None
        self.head = nn.Linear(hidden or stem, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))  # (N, C, H, W) or (N, T, C)
        if self.hidden is not None:
            return self.head(self.hidden(torch.flatten(F.adaptive_avg_pool2d(x, 2), 1)).relu())
        if x.dim() == 4:
            return self.head(x.mean((2, 3)))
        return self.head(x[:, 0] if self.has_class_token else x.mean(1))
