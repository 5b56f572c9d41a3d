"""How the widths of a training step's random subnets are drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from timm_autoslim.supernet.space import SearchSpace
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.utils.tables import Table

Sampler = Callable[[SearchSpace, torch.Generator], Widths]

SAMPLERS: Table[Sampler] = Table("sampler")
"""Samplers by name; each takes the search space and a generator, and returns the widths of one subnet.

- "independent": every group has a random width of its own, as in AutoSlim (`SearchSpace.sample`).
- "coarse": as "independent", but from eleven evenly spread widths of each group, which are a tenth of its range apart,
  as the steps of a search are. On a GPU, cuDNN plans every convolution whose channels are new to it, which can take
  longer than the step itself; with few widths nearly all are soon planned.
- "multiplier": one random multiplier for all groups, as in US-Nets (`SearchSpace.sample_multiplier`).
"""
SAMPLERS.add("independent")(SearchSpace.sample)
SAMPLERS.add("coarse")(functools.partial(SearchSpace.sample, steps=10))
SAMPLERS.add("multiplier")(SearchSpace.sample_multiplier)
