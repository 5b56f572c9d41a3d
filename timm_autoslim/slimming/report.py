"""One self-contained HTML page of what searches chose, with its figures: `python -m timm_autoslim report RUN`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.errors import ArtifactError
from timm_autoslim.slimming.accuracy import Accuracy
from timm_autoslim.slimming.baselines import BASELINES
from timm_autoslim.slimming.budgets import Budget
from timm_autoslim.slimming.figures import FIGURES, list_networks, name_loss, read_width, render_svg
from timm_autoslim.slimming.json_reader import JsonValue
from timm_autoslim.slimming.network import Found
from timm_autoslim.slimming.result import SearchResult
from timm_autoslim.utils.files import replace_file, write_text


def write_report(run: Path) -> Path:
    """Write RUN/report.html, and its figures as RUN/report/*.svg, from the results RUN/search/*.json of a run folder.

    The page holds its figures and needs no other file. It shows the widths of every group at each budget against the
    widest and the uniform network, the descent, the networks of all methods by cost and loss, the MACs of each module,
    and the numbers as a table, with the accuracies of RUN/exported/NETWORK/result.json where there are some. Searches
    that went on from a network of the run, RUN/to-*/search, are part of it. Networks of earlier searches that were
    fine-tuned have a table of their own.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: the folder holds no results, or one that cannot be read, or a result.json that cannot, and then
            nothing was written; or the folder cannot be written to.
    """
    results = read_results(run)
    tested, original = Accuracy.load_run(run), _read_original(run)
    names = [name for name in FIGURES if name != "descent" or any(result.steps for result in results)]
    pictures = {name: render_svg(FIGURES[name][0](results)) for name in names}
    folder, page = run / "report", run / "report.html"
    try:
        if page.is_dir():
            raise IsADirectoryError(f"{page} is a folder")
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            with replace_file(folder / f"{name}.svg") as part:
                part.write_bytes(picture)
        write_text(page, _render(run.resolve().name, results, tested, original, pictures))
    except OSError as error:
        raise ArtifactError(
            f"the report cannot be written ({error}); needed: a folder {folder} and a file {page}, new or of an "
            "earlier report; move away what is there, or make room"
        ) from error
    return page


def read_results(run: Path) -> list[SearchResult]:
    """Return the results of a run folder: the searched one first, then the baselines.

    Raises:
        ArtifactError: the folder holds none, or one that cannot be read, or two of different supernets.
    """
    paths = sorted((run / "search").glob("*.json"))
    if not paths:
        needed = "the run folder of a search, with a search/METHOD.json for each method"
        got = "a folder without search/*.json" if run.is_dir() else "no folder that is here"
        raise ArtifactError.at(str(run), got=got, needed=needed)
    results = {path: SearchResult.load(path) for path in paths}
    first = results[paths[0]]
    for path, result in results.items():
        if (result.groups, result.macs_by_module) != (first.groups, first.macs_by_module):
            needed, remedy = f"one of the same supernet as {paths[0].name}", "move one of them away, or search again"
            raise ArtifactError.at(str(path), got="a result of another supernet", needed=needed, remedy=remedy)
    order = [SearchResult.SEARCHED, *BASELINES]
    ordered = sorted(
        results.values(), key=lambda r: (order.index(r.method) if r.method in order else len(order), r.method)
    )
    if ordered[0].method == SearchResult.SEARCHED:
        ordered[0] = _join_stages(run, ordered[0])
    return ordered


def _join_stages(run: Path, first: SearchResult) -> SearchResult:
    """Return a search with those that went on from its networks: RUN/to-*/search, the widest first.

    Raises:
        ArtifactError: one cannot be read, or is of no network of this run.
    """
    stages = {path: SearchResult.load(path) for path in run.glob("to-*/search/searched.json")}
    result = first
    for path, stage in sorted(stages.items(), key=lambda item: -item[1].networks[0].cost.macs):
        joined = result.join(stage)
        if joined is None:
            needed, remedy = "a search that went on from a network of this run", "move the folder away"
            raise ArtifactError.at(str(path), got="a search of another supernet", needed=needed, remedy=remedy)
        result = joined
    return result


def _read_original(run: Path) -> float | None:
    """Return the accuracy of the original on the test images, in per cent; None if the run has not measured it.

    Raises:
        ArtifactError: the file of it cannot be read.
    """
    path = run / "original.json"
    if not path.is_file():
        return None
    parts = JsonValue.read(path, "what slim wrote; remove it, and the original is tested again").members()
    return parts["top1"].number() if "top1" in parts else None


def _describe_work(result: SearchResult) -> str:
    """Return what a method did, in a sentence."""
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    images = f" on up to {result.images:,} held-out images" if result.images else ""
    seconds = "" if result.seconds is None else f" in {result.seconds:.0f} s"
    return (
        f"{result.method} ({settings}): {result.evaluations:,} subnets scored{images}{seconds}; "
        f"{result.evaluated_macs / 1e12:.4g}T MACs of forward work (images times MACs)."
    )


# Pixels of a page for each point of a figure, at the least and at the most: letters of 8 points stay readable.
_LEAST, _MOST = 1.15, 1.35
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ name }}: search report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: var(--page); max-width: 1080px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin: 2em 0 .2em; }
p { margin: .3em 0 .8em; color: #555; }
:root { --page: #fff; --shadow: #0004; }
/* what is wider than the page scrolls sideways; shadows at its edges say so */
div { overflow-x: auto; background: linear-gradient(90deg, var(--page) 30%, transparent) 0 0 / 3em 100%,
  linear-gradient(270deg, var(--page) 30%, transparent) 100% 0 / 3em 100%,
  linear-gradient(90deg, var(--shadow), transparent) 0 0 / 1em 100%,
  linear-gradient(270deg, var(--shadow), transparent) 100% 0 / 1em 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } td { white-space: nowrap; }
tr.searched td { font-weight: 600; }
@media (max-width: 600px) { th, td { padding: .3em .5em; } td:first-child { white-space: normal; min-width: 6em; } }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --shadow: #fff4; }
  body { color: #ddd; background: var(--page); } p { color: #aaa; } th, td { border-color: #3a3f45; }
}
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>{{ base or "A model" }}, {{ macs.format(widest.macs) }} and {{ params.format(widest.params) }}.</p>
{%- for line in work %}
<p>{{ line }}</p>
{%- endfor %}
<h2>Numbers</h2>
<div>
<table>
<tr><th>budget</th><th>method</th><th>{{ macs.label }}</th><th>of the budget</th><th>{{ params.label }}</th>
<th>{{ loss }}</th>{% if accuracies %}<th>test top-1</th>{% endif %}</tr>
<tr><td></td><td>original</td><td>{{ macs.format_number(widest.macs) }}</td><td></td>
<td>{{ params.format_number(widest.params) }}</td>
<td>{{ '%.4f' % widest_loss if widest_loss is not none }}</td>
{%- if accuracies %}<td>{{ '%.2f %%' % original if original is not none }}</td>{% endif %}</tr>
{%- for budget, networks in budgets.items() %}{% for network in networks %}
<tr class="{{ network.method }}"><td>{{ budget }}</td><td>{{ network.method }}</td>
<td>{{ macs.format_number(network.cost.macs) }}</td><td>{{ '%.1f' % (100 * used(network)) }} %</td>
<td>{{ params.format_number(network.cost.params) }}</td><td>{{ '%.4f' % network.loss }}</td>
{%- if accuracies %}<td>{{ '%.2f %%' % accuracies[network.name] if network.name in accuracies }}</td>{% endif %}</tr>
{%- endfor %}{% endfor %}
</table>
</div>
{%- if further %}
<h2>Fine-tuned networks of earlier searches</h2>
<div>
<table>
<tr><th>network</th><th>budget</th><th>{{ macs.label }}</th><th>{{ params.label }}</th><th>test top-1</th></tr>
{%- for name, network in further.items() %}
<tr><td>{{ name }}</td><td>{{ network.budget }}</td><td>{{ macs.format_number(network.macs) }}</td>
<td>{{ params.format_number(network.params) }}</td><td>{{ '%.2f %%' % network.top1 }}</td></tr>
{%- endfor %}
</table>
</div>
{%- endif %}
{%- for figure in figures %}
<h2>{{ figure.title }}</h2>
<p>{{ figure.text }}</p>
<div><img alt="{{ figure.text }}" style="min-width: {{ figure.least }}px; max-width: {{ figure.most }}px"
src="data:image/svg+xml;base64,{{ figure.data }}"></div>
{%- endfor %}
</body>
</html>
"""


def _render(
    name: str,
    results: Sequence[SearchResult],
    tested: Mapping[str, Accuracy],
    original: float | None,
    pictures: Mapping[str, bytes],
) -> str:
    """Return the page."""
    figures = [
        {
            "title": FIGURES[key][1],
            "text": FIGURES[key][2],
            "data": base64.b64encode(picture).decode(),
            "least": round(_LEAST * read_width(picture)),
            "most": round(_MOST * read_width(picture)),
        }
        for key, picture in pictures.items()
    ]
    networks = {network.name: network.widths.to_dict() for result in results for network in result.networks}
    accuracies = {
        name: test.top1
        for name, test in tested.items()
        if name in networks and test.widths.items() <= networks[name].items()
    }
    values: dict[str, Any] = {
        "name": name,
        "base": results[0].base,
        "widest": results[0].widest,
        "widest_loss": next((result.widest_loss for result in results if result.widest_loss is not None), None),
        "macs": METRICS["macs"],
        "params": METRICS["params"],
        "work": [_describe_work(result) for result in results],
        "accuracies": accuracies,
        "original": original,
        "loss": name_loss(results),
        "further": {name: test for name, test in tested.items() if name not in accuracies},
        "budgets": list_networks(results),
        "used": _share_used,
        "figures": figures,
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_PAGE).render(values)


def _share_used(network: Found) -> float:
    return Budget(tuple(network.limits.items())).used(network.cost)
