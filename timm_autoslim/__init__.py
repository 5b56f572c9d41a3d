"""Slim any timm or torchvision model: one slimmable supernet, a greedy channel search, an ordinary smaller model."""

from timm_autoslim.costs import Cost, cost, uniform_at
from timm_autoslim.errors import AutoSlimError
from timm_autoslim.space import ChannelGroup, SearchSpace, Widths
from timm_autoslim.supernet import Supernet, convert

__version__ = "0.1.0"

__all__ = ["AutoSlimError", "ChannelGroup", "Cost", "SearchSpace", "Supernet", "Widths", "convert", "cost", "uniform_at"]
