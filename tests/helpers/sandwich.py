"""A small supernet, and what a training step needs: images, labels, logits and a generator, the same at each call."""

import torch
from torch import nn

from timm_autoslim import convert


def small_supernet(norm=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return convert(nn.Sequential(*layers), torch.zeros(2, 3, 8, 8), divisor=1, min=0.25).train()


def make_batch(n=12):
    """Return images (N, 3, 8, 8) and labels (N,) of five classes."""
    draw = make_generator(1)
    return torch.randn(n, 3, 8, 8, generator=draw), torch.randint(0, 5, (n,), generator=draw)


def make_generator(seed=7):
    return torch.Generator().manual_seed(seed)


def make_logits(seed, n=64, classes=6, spread=2.0):
    return spread * torch.randn(n, classes, generator=make_generator(seed))
