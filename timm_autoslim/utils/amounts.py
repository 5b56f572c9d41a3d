"""Costs for people: thousands, millions or billions, by size."""

from __future__ import annotations


def write_amount(value: float, places: int) -> str:
    """Return MACs or parameters for a table: in millions, unless there are few or very many.

    Args:
        value: how many.
        places: the decimal places of a number of millions.

    Example:
        >>> write_amount(22_430_000, 1), write_amount(364_000, 3), write_amount(41_234, 2), write_amount(512, 2)
        ('22.4M', '0.364M', '41.2K', '512')
        >>> write_amount(19_700_000_000, 1)
        '19.70G'
    """
    if value < 1e3:
        return f"{value:.0f}"
    if value < 1e5:
        return f"{value / 1e3:.1f}K"
    return f"{value / 1e6:.{places}f}M" if value < 1e10 else f"{value / 1e9:.2f}G"
