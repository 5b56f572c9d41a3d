"""How the widths of a training step's random subnets are drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch

from timm_autoslim.supernet.space import SearchSpace, Widths
from timm_autoslim.utils.tables import Table

Sampler = Callable[[SearchSpace, torch.Generator], Widths]

SAMPLERS: Table[Sampler] = Table("sampler")
"""Samplers by name; each takes the search space and a generator, and returns the widths of one subnet.

- "independent": every group has a random width of its own, as in AutoSlim (`SearchSpace.sample`).
- "multiplier": one random multiplier for all groups, as in US-Nets (`SearchSpace.sample_multiplier`).
"""
SAMPLERS.add("independent")(SearchSpace.sample)
SAMPLERS.add("multiplier")(SearchSpace.sample_multiplier)
