"""How many held-out images a search needs: on few, the subnet that seems best is the luckiest."""

from __future__ import annotations

import math

from timm_autoslim.errors import ConfigError
from timm_autoslim.utils.arguments import check_integer

_SUBNETS = 10  # that a search scores for each group and budget, about; benchmarks.md has figures
_DISAGREEING = 0.1  # share of the images on which one of two similar networks is right and the other wrong
_WANTED = 0.03  # accuracy by which luck may move the best of all subnets


def estimate_subnets(groups: int) -> int:
    """Return how many subnets a search scores for one budget, about.

    Args:
        groups: of channels, in the search space.

    Raises:
        ConfigError: no positive integer.

    Example:
        >>> estimate_subnets(8)
        80
    """
    return _SUBNETS * check_integer("groups", groups, ConfigError)


def describe_luck(images: int, groups: int) -> str:
    """Say how far luck decides which of the subnets seems best; empty where it hardly does.

    The accuracies of n similar subnets on N images scatter by about sqrt(d / N), where d is the share of the images on
    which two of them disagree; the best of n is then sqrt(2 ln(n) d / N) above the truth.

    Args:
        images: held-out images that rank the subnets.
        groups: of channels, in the search space, as for `estimate_subnets`.

    Raises:
        ConfigError: a number is none, or not positive.

    Example:
        >>> describe_luck(40, 8)[:29]
        '40 held-out images are few. A'
        >>> describe_luck(5000, 8)
        ''
    """
    images = check_integer("images", images, ConfigError)
    subnets = estimate_subnets(groups)
    luck = 2 * math.log(subnets) * _DISAGREEING
    needed = round(luck / _WANTED**2, -2)
    if needed <= images:
        return ""
    return (
        f"{images} held-out images are few. A search takes the best of about {subnets} subnets, and on so few images "
        f"luck alone moves the best by {100 * math.sqrt(luck / images):.1f} points; with {needed:.0f} images it is "
        f"{100 * _WANTED:.0f}."
    )
