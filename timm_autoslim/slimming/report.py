"""Figures and one self-contained HTML page of what a search found: `python -m timm_autoslim report RUN`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.files import replace_file, write_text

SEARCHED = "searched"
COLOURS = {
    SEARCHED: "#c0392b", "uniform": "#2c6fbb", "random": "#7f8c8d", "evolutionary": "#27853f", "importance": "#b7791f",
}  # fmt: skip
Network = Mapping[str, Any]


def write_report(run: Path) -> Path:
    """Write RUN/report.html, and its figures as RUN/report/*.png, from the search.json of a run folder.

    The page holds its figures and needs no other file. It shows the widths of every layer at each budget against the
    original and the uniform network, the descent, the networks of all methods by cost and error, the MACs of each
    layer, and the numbers as a table, with the accuracies of results.json where there is one.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: the folder holds no search.json, or one that this version cannot show, or a results.json that it
            cannot read, and then nothing was written; or the folder cannot be written to.
    """
    search = _read(run / "search.json")
    results = _read_results(run / "results.json")
    draw: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
        "widths": _draw_widths, "descent": _draw_descent, "pareto": _draw_pareto, "layers": _draw_layers,
    }  # fmt: skip
    try:
        pictures = {name: _png(make(search)) for name, make in draw.items() if name != "descent" or search["steps"]}
        page = _page(run.resolve().name, search, results, pictures)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, jinja2.TemplateError) as error:
        raise ArtifactError(
            f"{run}/search.json does not hold what the report shows ({type(error).__name__}: {error}); needed: what "
            "this version's recipes/search.py writes; search again"
        ) from error
    folder, whole = run / "report", run / "report.html"
    try:
        if whole.is_dir():
            raise IsADirectoryError(f"{whole} is a folder")
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            with replace_file(folder / f"{name}.png") as part:
                part.write_bytes(picture)
        write_text(whole, page)
    except OSError as error:
        raise ArtifactError(
            f"the report cannot be written ({error}); needed: a folder {folder} and a file {whole}, new or of an "
            "earlier report; move away what is there, or make room"
        ) from error
    return whole


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ArtifactError(f"{path.parent} holds no search.json; needed: the run folder of a finished search")
    found = _read_json(path, "search again")
    known = isinstance(found, dict) and found.get("format") == 1
    if not known or not found.get("networks"):
        raise ArtifactError(f"{path} is no search of a known format with at least one network; search again")
    return found  # type: ignore[no-any-return]


def _read_results(path: Path) -> Mapping[str, Mapping[str, float]]:
    """Return the accuracies by network, and none where there is no such file."""
    remedy = "remove it to do without accuracies, or fine-tune again"
    found = _read_json(path, remedy) if path.is_file() else {}
    rows = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(row, dict) and isinstance(row.get("top1"), (int, float)) for row in rows):
        raise ArtifactError(f"{path} is no table of accuracies; needed: what recipes/finetune.py writes; {remedy}")
    return found


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is no JSON that can be read ({error}); {remedy}") from error


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(rows, 1, i + 1) for i in range(rows)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _budgets(search: Mapping[str, Any]) -> dict[str, list[Network]]:
    """Return the networks by budget, in the order of the descent."""
    found: dict[str, list[Network]] = {}
    for network in search["networks"]:
        found.setdefault(f"{network['unit']} {network['asked']}", []).append(network)
    return found


def _of_kind(networks: Sequence[Network], kind: str) -> Network | None:
    return next((network for network in networks if network["kind"] == kind), None)


def _draw_widths(search: Mapping[str, Any]) -> Figure:
    """Channels of every group at each budget: original, uniform, searched (the form of arXiv 1903.11728's figures)."""
    groups: Mapping[str, int] = search["groups"]
    budgets = _budgets(search)
    figure, axes = _figure(max(8.0, 0.32 * len(groups) + 2), 2.3 * len(budgets) + 1.4, len(budgets))
    place = np.arange(len(groups))
    for ax, (budget, networks) in zip(axes, budgets.items(), strict=True):
        ax.bar(place, list(groups.values()), 0.85, color="#e4e7ea", label="original")
        for kind, dx in ((SEARCHED, -0.2), ("uniform", 0.2)):
            network = _of_kind(networks, kind)
            if network is not None:
                ax.bar(place + dx, [network["widths"][g] for g in groups], 0.38, color=COLOURS[kind], label=kind)
        ax.set_title(f"budget {budget}", loc="left", fontsize=10)
        ax.set_ylabel("width")
        ax.set_xlim(-0.7, len(groups) - 0.3)
        ax.set_xticks(place, [""] * len(groups))
    axes[0].legend(ncols=3, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    axes[-1].set_xticks(place, list(groups), rotation=90, fontsize=8)
    return figure


def _draw_descent(search: Mapping[str, Any]) -> Figure:
    """Error over MACs, and the width of every group after each step."""
    steps, groups = search["steps"], search["groups"]
    figure = Figure(figsize=(10, 4 + 0.2 * len(groups)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 0.9 + 0.19 * len(groups)])
    top.plot([s["macs"] / 1e6 for s in steps], [s["error"] for s in steps], ".-", color=COLOURS[SEARCHED], lw=1, ms=4)
    for budget in {s["budget"] for s in steps if s["unit"] == "macs"}:
        top.axvline(budget / 1e6, color="#999999", lw=0.8, ls="--")
    top.invert_xaxis()
    top.set_xlabel("million MACs (dashed: budgets)")
    top.set_ylabel("held-out error")
    top.spines[["top", "right"]].set_visible(False)
    shares = np.ones((len(groups), len(steps) + 1))
    rows = {name: row for row, name in enumerate(groups)}
    for step in steps:
        shares[rows[step["group"]], step["index"] + 1 :] = step["width"] / groups[step["group"]]
    image = bottom.imshow(shares, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    bottom.set_yticks(range(len(groups)), list(groups), fontsize=8)
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=bottom, label="share of the width", pad=0.01)
    return figure


def _draw_pareto(search: Mapping[str, Any]) -> Figure:
    """Held-out error of all networks over MACs and over parameters, one line for each method."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for ax, unit in zip(figure.subplots(1, 2, sharey=True), ("macs", "params"), strict=True):
        for kind in dict.fromkeys(network["kind"] for network in search["networks"]):
            points = sorted((n[unit] / 1e6, n["error"]) for n in search["networks"] if n["kind"] == kind)
            ax.plot(*zip(*points, strict=True), "o-", label=kind, color=COLOURS.get(kind), ms=5, lw=1)
        ax.set_xlabel({"macs": "million MACs", "params": "million parameters"}[unit])
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_ylabel("held-out error" if unit == "macs" else "")
    ax.legend(fontsize=8, frameon=False)
    return figure


def _draw_layers(search: Mapping[str, Any]) -> Figure:
    """MACs of every layer: the original's, and the searched networks'."""
    whole: Mapping[str, int] = search["widest"]["layers"]
    shown = {"original": whole}
    for budget, networks in _budgets(search).items():
        network = _of_kind(networks, SEARCHED) or networks[0]
        shown[f"{network['kind']} {budget}"] = network["layers"]
    figure, (ax,) = _figure(max(8.0, 0.26 * len(whole) + 2), 4.6)
    place, each = np.arange(len(whole)), 0.85 / len(shown)
    for index, (name, layers) in enumerate(shown.items()):
        colour = "#c9ced3" if not index else f"C{index - 1}"
        ax.bar(place + (index - (len(shown) - 1) / 2) * each, [layers[p] / 1e6 for p in whole], each, label=name,
               color=colour)  # fmt: skip
    ax.set_xticks(place, list(whole), rotation=90, fontsize=7)
    ax.set_xlim(-0.7, len(whole) - 0.3)
    ax.set_ylabel("million MACs")
    ax.legend(fontsize=8, frameon=False)
    return figure


TITLES = {
    "widths": ("Widths", "Channels of every group: the original, the searched and the uniformly narrowed network."),
    "descent": ("The descent", "The error after each step, and which layer was slimmed when."),
    "pareto": ("Cost and error", "Error on the held-out images, before any fine-tuning, with batch statistics."),
    "layers": ("Costs per layer", "Multiply-adds of every layer for one image."),
}

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ name }}: search report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin: 2em 0 .2em; }
p { margin: .3em 0 .8em; color: #555; } img { max-width: 100%; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.searched td { font-weight: 600; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>{{ search.model }}, {{ millions(search.widest.macs) }}M MACs and {{ millions(search.widest.params, 3) }}M parameters.
{{ search.mode }} descent, ranked by {{ search.rank }}: {{ search.evaluations }} subnets scored on up to
{{ search.images }} held-out images in {{ '%.0f' % search.seconds }} s;
{{ '%.4g' % (search.evaluated_macs / 1e12) }}T MACs of forward work (images times MACs).</p>
<h2>Numbers</h2>
<table>
<tr><th>budget</th><th>network</th><th>MACs</th><th>of the budget</th><th>params</th><th>held-out error</th>
{%- if results %}<th>test top-1</th>{% endif %}</tr>
{%- for budget, networks in budgets.items() %}{% for network in networks %}
<tr class="{{ network.kind }}"><td>{{ budget }}</td><td>{{ network.kind }}</td>
<td>{{ millions(network.macs) }}M</td><td>{{ '%.1f' % (100 * used(network)) }} %</td>
<td>{{ millions(network.params, 3) }}M</td><td>{{ '%.4f' % network.error }}</td>
{%- if results %}<td>{{ '%.2f %%' % results[network.name].top1 if network.name in results }}</td>{% endif %}</tr>
{%- endfor %}{% endfor %}
</table>
{%- for key, data in pictures.items() %}
<h2>{{ titles[key][0] }}</h2>
<p>{{ titles[key][1] }}</p>
<img alt="{{ titles[key][1] }}" src="data:image/png;base64,{{ data }}">
{%- endfor %}
</body>
</html>
"""


def _page(
    name: str, search: Mapping[str, Any], results: Mapping[str, Any], pictures: Mapping[str, bytes]
) -> str:  # fmt: skip
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_PAGE).render(
        name=name, search=search, results=results, titles=TITLES, budgets=_budgets(search),
        pictures={key: base64.b64encode(picture).decode() for key, picture in pictures.items()},
        millions=lambda value, digits=2: f"{value / 1e6:.{digits}f}",
        used=lambda network: max(network[unit] / limit for unit, limit in network["limits"].items()),
    )  # fmt: skip
