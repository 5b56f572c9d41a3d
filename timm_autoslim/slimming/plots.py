"""Figures of search results, as matplotlib's: those of the report. A notebook shows them, and `savefig` writes them."""

from __future__ import annotations

from timm_autoslim.errors import ConfigError
from timm_autoslim.slimming.figures import Drawing, draw_descent, draw_losses, draw_widths
from timm_autoslim.slimming.result import SearchResult


def widths(*results: SearchResult) -> Drawing:
    """Draw the width of every group at each budget: the original, the searched and the uniform network.

    Args:
        *results: of one supernet: of `search`, and of `baseline` to compare with.

    Raises:
        ConfigError: an argument is no SearchResult, or they are of different supernets.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import baseline, convert, plot
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> result = baseline(supernet, {"macs": "50%"}, lambda subnet: 0.0, "uniform")
        >>> plot.widths(result).axes[0].get_title(loc="left")
        'macs<=50%'
    """
    return draw_widths(_check(results))


def descent(result: SearchResult) -> Drawing:
    """Draw the loss of every step of a search, its networks, and the width of every group after each step.

    Raises:
        ConfigError: the argument is no SearchResult, or has no steps: a baseline has none.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert, plot, search
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> result = search(supernet, {"macs": "95%"}, lambda subnet: 0.0)
        >>> plot.descent(result).axes[0].get_ylabel()
        'held-out loss'
    """
    (result,) = _check([result])
    if not result.steps:
        raise ConfigError.at(
            "result", got="one without steps", needed="what search returned; baselines have no descent"
        )
    return draw_descent([result])


def pareto(*results: SearchResult) -> Drawing:
    """Draw the held-out loss of all networks over MACs and over parameters, one line for each method.

    Args:
        *results: of one supernet.

    Raises:
        ConfigError: an argument is no SearchResult, or they are of different supernets.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import baseline, convert, plot
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> results = [baseline(supernet, {"macs": ["50%", "30%"]}, lambda subnet: 0.0, "uniform")]
        >>> len(plot.pareto(*results).axes)
        2
    """
    return draw_losses(_check(results))


def _check(results: object) -> list[SearchResult]:
    """Return results of one supernet.

    Raises:
        ConfigError: they are not, or there is none.
    """
    members = list(results) if isinstance(results, tuple | list) else []
    if not members or not all(isinstance(result, SearchResult) for result in members):
        got = ", ".join(type(result).__name__ for result in members) or "nothing"
        raise ConfigError.at("results", got=got, needed="what search or baseline returned")
    if any(result.groups != members[0].groups for result in members):
        raise ConfigError.at("results", got="those of different supernets", needed="results of one supernet")
    return members
