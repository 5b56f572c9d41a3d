"""The figures of a report: widths, the descent, losses over costs, and costs per module."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.slimming.result import Found, SearchResult

SEARCHED = SearchResult.SEARCHED
COLOURS = {
    SEARCHED: "#c0392b", "uniform": "#2c6fbb", "random": "#7f8c8d", "evolutionary": "#27853f", "importance": "#b7791f",
}  # fmt: skip


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


def render_png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _make_figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(rows, 1, i + 1) for i in range(rows)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_widths(results: Sequence[SearchResult]) -> Figure:
    """Draw the width of every group at each budget: widest, uniform, searched (as in arXiv 1903.11728's figures)."""
    sizes = {group.name: group.size for group in results[0].groups}
    networks = list_networks(results)
    figure, axes = _make_figure(max(8.0, 0.32 * len(sizes) + 2), 2.3 * len(networks) + 1.4, len(networks))
    place = np.arange(len(sizes))
    for ax, (budget, of_budget) in zip(axes, networks.items(), strict=True):
        ax.bar(place, list(sizes.values()), 0.85, color="#e4e7ea", label="widest")
        for method, dx in ((SEARCHED, -0.2), ("uniform", 0.2)):
            network = find_network(of_budget, method)
            if network is not None:
                widths = list(network.widths.values())
                ax.bar(place + dx, widths, 0.38, color=COLOURS[method], label=method)
        ax.set_title(f"budget {budget}", loc="left", fontsize=10)
        ax.set_ylabel("width")
        ax.set_xlim(-0.7, len(sizes) - 0.3)
        ax.set_xticks(place, [""] * len(sizes))
    axes[0].legend(ncols=3, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    axes[-1].set_xticks(place, list(sizes), rotation=90, fontsize=8)
    return figure


def draw_descent(results: Sequence[SearchResult]) -> Figure:
    """Draw the loss over MACs, and the width of every group after each step, of the first result with steps."""
    result = next(result for result in results if result.steps)
    steps, sizes, macs = result.steps, {group.name: group.size for group in result.groups}, METRICS["macs"]
    figure = Figure(figsize=(10, 4 + 0.2 * len(sizes)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 0.9 + 0.19 * len(sizes)])
    costs = [step.macs / macs.scale for step in steps]
    top.plot(costs, [step.loss for step in steps], ".-", color=COLOURS[SEARCHED], lw=1, ms=4)
    for budget in {step.budget for step in steps if step.metric == "macs"}:
        top.axvline(budget / macs.scale, color="#999999", lw=0.8, ls="--")
    top.invert_xaxis()
    top.set_xlabel(f"{macs.label} (dashed: budgets)")
    top.set_ylabel(name_loss(results))
    top.spines[["top", "right"]].set_visible(False)
    shares = np.ones((len(sizes), len(steps) + 1))
    rows = {name: row for row, name in enumerate(sizes)}
    for number, step in enumerate(steps, start=1):
        shares[rows[step.group], number:] = step.width / sizes[step.group]
    image = bottom.imshow(shares, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    bottom.set_yticks(range(len(sizes)), list(sizes), fontsize=8)
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=bottom, label="share of the width", pad=0.01)
    return figure


def draw_losses(results: Sequence[SearchResult]) -> Figure:
    """Draw the held-out loss of all networks over MACs and over parameters, one line for each method."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2, sharey=True), ("macs", "params"), strict=True):
        metric = METRICS[name]
        for result in results:
            points = sorted((network.cost.pick(name) / metric.scale, network.loss) for network in result.networks)
            colour = COLOURS.get(result.method)
            ax.plot(*zip(*points, strict=True), "o-", label=result.method, color=colour, ms=5, lw=1)
        ax.set_xlabel(metric.label)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_ylabel(name_loss(results) if name == "macs" else "")
    ax.legend(fontsize=8, frameon=False)
    return figure


def draw_modules(results: Sequence[SearchResult]) -> Figure:
    """Draw the MACs of every module: the widest's, and those of the searched networks."""
    widest, macs = results[0].macs_by_module, METRICS["macs"]
    bars = {"widest": widest}
    for budget, networks in list_networks(results).items():
        network = find_network(networks, SEARCHED) or networks[0]
        bars[f"{network.method} {budget}"] = network.macs_by_module
    figure, (ax,) = _make_figure(max(8.0, 0.26 * len(widest) + 2), 4.6)
    place, each = np.arange(len(widest)), 0.85 / len(bars)
    for index, (name, by_module) in enumerate(bars.items()):
        colour = "#c9ced3" if not index else f"C{index - 1}"
        heights = [by_module[path] / macs.scale for path in widest]
        ax.bar(place + (index - (len(bars) - 1) / 2) * each, heights, each, label=name, color=colour)
    ax.set_xticks(place, list(widest), rotation=90, fontsize=7)
    ax.set_xlim(-0.7, len(widest) - 0.3)
    ax.set_ylabel(macs.label)
    ax.legend(fontsize=8, frameon=False)
    return figure


# By name: what draws it, its title, and what it shows.
FIGURES: dict[str, tuple[Callable[[Sequence[SearchResult]], Figure], str, str]] = {
    "widths": (draw_widths, "Widths", "Width of every group: the widest, the searched and the uniform network."),
    "descent": (draw_descent, "The descent", "The loss after each step, and which group was slimmed when."),
    "losses": (draw_losses, "Cost and loss", "The held-out loss, before any fine-tuning, with batch statistics."),
    "modules": (draw_modules, "Costs per module", "Multiply-adds of every module for one image."),
}
