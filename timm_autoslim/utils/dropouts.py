"""Which modules drop values in training, and pass everything on in evaluation."""

from __future__ import annotations

from torch import nn

# By name, so that torchvision need not be imported, and copies of these classes in other libraries count too.
_DROP_MODULES = frozenset(
    ("DropPath", "DropBlock2d", "DropBlock3d", "PatchDropout", "PatchDropoutWithIndices", "StochasticDepth")
)


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is one of torch's dropouts, or a drop path, drop block or patch dropout."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return True
    return any(kind.__name__ in _DROP_MODULES for kind in type(module).__mro__)
