"""A small model with two groups, random weights for any model, and its states in training.

Random weights replace what a library starts with, zero-initialised BatchNorms and tiny LayerScales included: a wrong
channel that is multiplied by zero would go unseen.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CLASSES = 10


class TwoGroups(nn.Module):
    """Three convolutions, BatchNorms and a classifier: the groups are "stem" (8 channels) and "inner" (16)."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn_inner = nn.BatchNorm2d(2 * width)
        self.outer = nn.Conv2d(2 * width, width, 1, bias=False)
        self.bn_outer = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()  # (N, C, H, W)
        x = x + self.bn_outer(self.outer(self.bn_inner(self.inner(x)).relu()))
        return self.head(x.relu().mean((2, 3)))


@torch.no_grad()
def randomise(model):
    """Draw every parameter and every BatchNorm statistic anew, on a scale that keeps activations near 1."""
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        if fan_in > 1:
            bound = (4.5 / fan_in) ** 0.5
            parameter.uniform_(-bound, bound)
        elif name.endswith("bias"):
            parameter.uniform_(-0.3, 0.3)
        else:
            parameter.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return model


def train_without_chance(model):
    """Put `model` in training mode, but switch off what draws random numbers there."""
    model.train()
    for module in model.modules():
        if type(module).__name__ in ("Dropout", "DropPath", "StochasticDepth"):
            module.eval()
    return model


def mark_calibrated(model):
    """Mark the BatchNorm statistics as the model's own, as `calibrate` does."""
    for module in model.modules():
        if getattr(module, "num_batches_tracked", None) is not None:
            module.num_batches_tracked.fill_(1)
    return model
