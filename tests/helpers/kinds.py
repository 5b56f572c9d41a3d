"""Small models of several kinds, for tests that try what a model can be: each has widths to choose, and runs fast."""

import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.models import CLASSES, TwoGroups, randomise

IMAGES = (3, 8, 8)


class Writing(TwoGroups):
    """Its forward writes buffers, tensor attributes, numbers, lists and dicts, and reads some of them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(8))
        self.register_buffer("count", torch.tensor(0.0))
        self.last, self.calls, self.log = torch.zeros(8), 0, {"means": []}

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()  # (N, C, H, W)
        if self.training:
            self.total += x.detach().mean((0, 2, 3))
            self.count += 1
            self.calls += 1
            self.log["means"] = [*self.log["means"][-2:], self.calls]
            self.last = x.detach().mean((0, 2, 3))
        x = x - (self.total / (1 + self.count))[:, None, None] + 0.1 * self.last[:, None, None]
        x = x + self.bn_outer(self.outer(self.bn_inner(self.inner(x)).relu()))
        return self.head(x.relu().mean((2, 3)))


class Shared(nn.Module):
    """Runs one module three times, under two names, and ties the weights of two others."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.again = self.block
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.again(x) + x
        x = self.block(self.block(x)).mean((2, 3))
        return self.head((self.first(x) + self.second(x)).relu())


class Listed(nn.Module):
    """Holds its weights and layers in plain lists and dicts too, and runs them from there."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(12, 8)
        self.head = nn.Linear(8, CLASSES)
        self.weights = [self.inner.weight, self.inner.bias]
        self.layers = {"outer": [self.outer], "head": (self.head,)}
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        x = self.stem(x).relu().mean((2, 3))
        x = self.drop(nn.functional.linear(x, *self.weights).relu())
        return self.layers["head"][0](self.layers["outer"][0](x))


class Recurrent(nn.Module):
    """An LSTM over the rows of the images."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(24, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        rows = x.transpose(1, 2).flatten(2)  # (N, H, C * W)
        return self.head(self.lstm(self.project(rows).relu())[0][:, -1])


class Checkpointed(TwoGroups):
    """Computes two parts of itself again in backward, in both of torch's ways."""

    def grow(self, x):
        return self.bn_inner(self.inner(x)).relu()

    def shrink(self, x):
        return self.bn_outer(self.outer(x))

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        inner = checkpoint(self.grow, x, use_reentrant=True)
        x = x + checkpoint(self.shrink, inner, use_reentrant=False)
        return self.head(x.relu().mean((2, 3)))


def make_vit():
    """Make a transformer with fused qkv, layer scale, drop path, and position embeddings."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES,
        init_values=0.1, drop_path_rate=0.2,
    )  # fmt: skip


KINDS = {
    "cnn": TwoGroups,
    "vit": make_vit,
    "checkpointed": Checkpointed,
    "writing": Writing,
    "shared": Shared,
    "listed": Listed,
    "lstm": Recurrent,
}


def make_kind(kind):
    """Make a model with random weights; the seed is fixed."""
    torch.manual_seed(0)
    return randomise(KINDS[kind]())
