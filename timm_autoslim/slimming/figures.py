"""The figures of a report: widths, the descent, losses over costs, and costs per module."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.slimming.network import Found
from timm_autoslim.slimming.result import SearchResult

SEARCHED = SearchResult.SEARCHED
ORIGINAL = "original"  # the widest subnet, which computes what the original does
COLOURS = {
    SEARCHED: "#c0392b", "uniform": "#2c6fbb", "random": "#7f8c8d", "evolutionary": "#27853f", "importance": "#b7791f",
}  # fmt: skip

_TALL = 30  # rows from which on a figure of bars has its axis at the top as well
MANY, SMALL = 40, 0.005  # modules from which on those below this share of the MACs stand in one row


def name_loss(results: Sequence[SearchResult]) -> str:
    """Return what the losses of results are called: scores that were maximised are losses with the sign turned."""
    return "held-out loss (negative score)" if any(result.maximize for result in results) else "held-out loss"


def list_networks(results: Sequence[SearchResult]) -> dict[str, list[Found]]:
    """Return the networks of all results by the text of their budget, in the order of the descent."""
    networks: dict[str, list[Found]] = {}
    for result in results:
        for network in result.networks:
            networks.setdefault(network.text, []).append(network)
    return networks


def find_network(networks: Sequence[Found], method: str) -> Found | None:
    """Return the first network of a method, or None."""
    return next((network for network in networks if network.method == method), None)


# Colours of text and of what is there before anything is slimmed; a page has them in light and in dark.
INK, QUIET = "#010203", "#040506"
_STYLE = """<style>
:root { color: #222; --quiet: #d5dade; }
@media (prefers-color-scheme: dark) { :root { color: #ddd; --quiet: #4a5057; } }
</style>"""
_SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "timm-autoslim", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none",
    "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip


class Drawing(Figure):
    """A figure that a notebook shows as SVG, in the colours of its page, without pyplot."""

    def _repr_svg_(self) -> str:
        return render_svg(self).decode()


def render_svg(figure: Figure) -> bytes:
    """Return a figure as the content of an SVG file, whose colours are those of the reader: light or dark."""
    file = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})  # type: ignore[no-untyped-call]
    text = file.getvalue().replace(INK, "currentColor").replace(QUIET, "var(--quiet)")
    start = text.index(">", text.index("<svg")) + 1
    return (text[:start] + _STYLE + text[start:]).encode()


def read_width(picture: bytes) -> float:
    """Return the width of an SVG file of `render_svg`, in points."""
    match = re.search(rb'<svg[^>]* width="([\d.]+)pt"', picture)
    assert match is not None
    return float(match[1])


def _draw(draw: Callable[[Sequence[SearchResult]], Drawing]) -> Callable[[Sequence[SearchResult]], Drawing]:
    """Return a function that draws with the settings of all figures."""

    @functools.wraps(draw)
    def run(results: Sequence[SearchResult]) -> Drawing:
        with matplotlib.rc_context(_SETTINGS):
            return draw(results)

    return run


def _make_rows(count: int, columns: int = 1) -> tuple[Drawing, list[Axes]]:
    """Return a figure of bars, one row below the other, as tall as the rows need."""
    width = 8.0 if columns < 3 else 2.0 + 3.0 * columns
    figure = Drawing(figsize=(width, 1.3 + 0.21 * count), layout="constrained")
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0].tolist()
    for ax in axes:
        ax.set_ylim(count - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        if count > _TALL:
            ax.tick_params(axis="x", top=True, labeltop=True)
    return figure, axes


def _put_legend_above(figure: Drawing, ax: Axes) -> None:
    """Put the legend above the axes, at the left: a phone shows that part of a wide figure first."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=2 if max(map(len, labels)) > 20 else 4, fontsize=9, loc="outside upper left")


@_draw
def draw_widths(results: Sequence[SearchResult]) -> Drawing:
    """Draw what every group has left of its width at each budget: widest, uniform, searched."""
    sizes = {group.name: group.size for group in results[0].groups}
    networks = list_networks(results)
    figure, axes = _make_rows(len(sizes), len(networks))
    place = np.arange(len(sizes))
    for ax, (budget, of_budget) in zip(axes, networks.items(), strict=True):
        ax.barh(place, np.ones(len(sizes)), 0.8, color=QUIET, label=ORIGINAL)
        by_method = {method: find_network(of_budget, method) for method in (SEARCHED, "uniform")}
        bars = [(method, network) for method, network in by_method.items() if network is not None]
        for index, (method, network) in enumerate(bars):
            shares = [network.widths[name] / size for name, size in sizes.items()]
            shift = 0.4 * index - 0.2 * (len(bars) - 1)  # one bar is in the middle
            ax.barh(place + shift, shares, 0.36 if len(bars) > 1 else 0.5, color=COLOURS[method], label=method)
        ax.set_title(budget, loc="left", fontsize=10)
        ax.set_xlabel("share of the width")
    # groups of 8 and of 2,000 channels stand below each other: shares tell what each has left, names its width
    axes[0].set_yticks(place, [f"{name}  {size}" for name, size in sizes.items()], fontsize=8)
    _put_legend_above(figure, axes[0])
    return figure


@_draw
def draw_descent(results: Sequence[SearchResult]) -> Drawing:
    """Draw the loss over MACs, and the width of every group after each step, of the first result with steps."""
    result = next(result for result in results if result.steps)
    steps, sizes, macs = result.steps, {group.name: group.size for group in result.groups}, METRICS["macs"]
    figure = Drawing(figsize=(8, 4 + 0.2 * len(sizes)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 0.9 + 0.19 * len(sizes)])
    points = [(step.macs / macs.scale, step.loss) for step in steps]
    if result.widest_loss is not None:
        points.insert(0, (result.widest.macs / macs.scale, result.widest_loss))
        top.plot(*points[0], "s", color=INK, label=ORIGINAL)
    top.plot(*zip(*points, strict=True), ".-", color=COLOURS[SEARCHED], lw=1, ms=4, label="descent")
    refined = [(network.cost.macs / macs.scale, network.loss) for network in result.networks]
    top.plot(*zip(*refined, strict=True), "D", color=COLOURS[SEARCHED], ms=7, mfc="none", label="networks, refined")
    for budget in {step.budget for step in steps if step.metric == "macs"}:
        top.axvline(budget / macs.scale, color=QUIET, lw=1, ls="--", zorder=0)
    top.invert_xaxis()
    top.set_xlabel(f"{macs.label} (dashed: budgets)")
    top.set_ylabel(name_loss(results))
    top.legend(fontsize=8)
    shares = np.ones((len(sizes), len(steps) + 1))
    rows = {name: row for row, name in enumerate(sizes)}
    for number, step in enumerate(steps, start=1):
        shares[rows[step.group], number:] = step.width / sizes[step.group]
    image = bottom.imshow(shares, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    bottom.set_yticks(range(len(sizes)), list(sizes), fontsize=8)
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    share = min(1.0, 2 / (0.9 + 0.19 * len(sizes)))  # two inches of the rows, however many there are
    figure.colorbar(image, cax=bottom.inset_axes((1.015, 1 - share, 0.02, share)), label="share of the width")
    return figure


@_draw
def draw_losses(results: Sequence[SearchResult]) -> Drawing:
    """Draw the held-out loss of all networks over MACs and over parameters, one line for each method."""
    figure = Drawing(figsize=(8, 3.8), layout="constrained")
    widest_loss = next((result.widest_loss for result in results if result.widest_loss is not None), None)
    for ax, name in zip(figure.subplots(1, 2, sharey=True), ("macs", "params"), strict=True):
        metric = METRICS[name]
        if widest_loss is not None:
            ax.plot(results[0].widest.pick(name) / metric.scale, widest_loss, "s", color=INK, label=ORIGINAL)
        for result in results:
            points = sorted((network.cost.pick(name) / metric.scale, network.loss) for network in result.networks)
            colour = COLOURS.get(result.method)
            ax.plot(*zip(*points, strict=True), "o-", label=result.method, color=colour, ms=5, lw=1)
        ax.set_xlabel(metric.label)
        ax.grid(color=QUIET, alpha=0.5)
        ax.set_ylabel(name_loss(results) if name == "macs" else "")
    _put_legend_above(figure, ax)
    return figure


@_draw
def draw_modules(results: Sequence[SearchResult]) -> Drawing:
    """Draw the MACs of every module: the widest's, and those of the searched networks."""
    networks = [find_network(of, SEARCHED) or of[0] for of in list_networks(results).values()]
    widest, *by_network = _join_small([results[0].macs_by_module, *(network.macs_by_module for network in networks)])
    macs = METRICS["macs"]
    figure, (ax,) = _make_rows(len(widest))
    place, each = np.arange(len(widest)), 0.8 / len(networks)
    ax.barh(place, [count / macs.scale for count in widest.values()], 0.8, color=QUIET, label=ORIGINAL)
    for index, (network, counts) in enumerate(zip(networks, by_network, strict=True)):
        shade = 1 - 0.6 * index / max(1, len(networks) - 1)  # the smaller the budget, the lighter
        ax.barh(
            place + (index - (len(networks) - 1) / 2) * each, [counts[path] / macs.scale for path in widest],
            0.9 * each, alpha=shade,
            color=COLOURS.get(network.method), label=f"{network.method} {network.text}",
        )  # fmt: skip
    ax.set_yticks(place, list(widest), fontsize=8)
    ax.set_xlabel(macs.label)
    _put_legend_above(figure, ax)
    return figure


def _join_small(by_module: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """Return MACs by module; of a model with many modules, those that have hardly any are added up in one row.

    Args:
        by_module: of the widest, and of the networks.
    """
    widest = by_module[0]
    least = SMALL * sum(widest.values()) if len(widest) > MANY else 0
    small = [path for path, count in widest.items() if count < least]
    others = f"{len(small)} others" if small else ""
    return [
        {path: count for path, count in counts.items() if path not in small}
        | ({others: sum(counts[path] for path in small)} if small else {})
        for counts in by_module
    ]


# By name: what draws it, its title, and what it shows.
FIGURES: dict[str, tuple[Callable[[Sequence[SearchResult]], Drawing], str, str]] = {
    "widths": (
        draw_widths,
        "Widths",
        "What every group has left of its width (the number beside its name).",
    ),
    "descent": (
        draw_descent,
        "The descent",
        "The loss after each step, on some or all images, and which group was slimmed when.",
    ),
    "losses": (draw_losses, "Cost and loss", "The held-out loss, before any fine-tuning, with batch statistics."),
    "modules": (draw_modules, "Costs per module", "Multiply-adds of the modules for one image."),
}
