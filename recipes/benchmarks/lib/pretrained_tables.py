"""Tables and a figure of the benchmark from a trained model."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SHARES, EPOCHS = (0.5, 0.25), (1, 5)
"""Of the MACs, falling; of the trainings that all networks have."""


def make_tables(rows: list[Row]) -> str:
    """Return both tables of every model, below its name."""
    parts = []
    for name, of_model in split_models(rows).items():
        parts += [f"**{name}**", make_table(of_model), make_compute_table(of_model)]
    return "\n\n".join(parts)


def split_models(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each model."""
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    return models


def make_table(rows: list[Row]) -> str:
    """Return a line for each method, start and teacher, with means over the seeds; columns that were measured."""
    rows = [row for row in rows if "top1" in row and row["epochs"] in (0, *EPOCHS)]
    counts = sorted({row["epochs"] for row in rows})
    cells: dict[tuple[str, str, str], dict[tuple[float, int], list[float]]] = {}
    for row in rows:
        trained = {r["teacher"] for r in rows if (r["method"], r["start"]) == (row["method"], row["start"])} - {None}
        for teacher in [row["teacher"]] if row["teacher"] else sorted(trained) or ["nothing"]:
            values = cells.setdefault((row["method"], row["start"], teacher), {})
            values.setdefault((row["share"], row["epochs"]), []).append(row["top1"])
    columns = [(share, count) for share in SHARES for count in counts]
    words = {0: "no training", 1: "1 epoch"}
    titles = [f"{share:.0%}, {words.get(count, f'{count} epochs')}" for share, count in columns]
    lines = [f"| method | start | trained with | {' | '.join(titles)} |", "|---" * (3 + len(columns)) + "|"]
    for names, values in cells.items():
        lines.append(f"| {' | '.join((*names, *(_show(values.get(column, [])) for column in columns)))} |")
    return "\n".join(lines)


def collect_points(rows: list[Row]) -> dict[tuple[float, str, str, float], list[Row]]:
    """Return the rows of all seeds by share, method, start and epochs, without those trained with labels alone."""
    points: dict[tuple[float, str, str, float], list[Row]] = {}
    for row in rows:
        if "top1" in row and row["teacher"] != "labels":
            points.setdefault((row["share"], row["method"], row["start"], row["epochs"]), []).append(row)
    return points


def make_compute_table(rows: list[Row]) -> str:
    """Return a line for each network and training, by what all of it took; means over the seeds."""
    lines = [
        "| share | method | start | epochs | MACs | params | compute | CPU minutes | top-1 | seeds |",
        "|---" * 10 + "|",
    ]
    points = collect_points(rows)
    for key in sorted(points, key=lambda key: (-key[0], _mean(points[key], "compute"))):
        share, method, start, epochs = key
        cut, trained = points.get((*key[:3], 0), []), points[key]
        sizes = f"{_mean(cut, 'macs'):.1%} | {_mean(cut, 'params') / 1e6:.2f}M" if cut else " | "
        spent = f"{_mean(trained, 'compute') / 1000:.0f}k | {_mean(trained, 'seconds') / 60:.1f}"
        top1 = _show([row["top1"] for row in trained])
        lines.append(f"| {share:.0%} | {method} | {start} | {epochs} | {sizes} | {spent} | {top1} | {len(trained)} |")
    return "\n".join(lines)


def _mean(rows: list[Row], key: str) -> float:
    return float(statistics.mean(row[key] for row in rows))


def draw(rows: list[Row], path: Path) -> None:
    """Draw accuracy against compute, the models one below the other."""
    from matplotlib.figure import Figure

    models = split_models(rows)
    ways = list(dict.fromkeys(key[1:3] for key in collect_points(rows)))
    figure = Figure(figsize=(9, 1 + 3 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(SHARES), sharey="row", squeeze=False)
    for axes, (name, of_model) in zip(grid, models.items(), strict=True):
        points = collect_points(of_model)
        for axis, share in zip(axes, SHARES, strict=True):
            for index, way in enumerate(ways):
                of_way = [rows for key, rows in points.items() if key[:3] == (share, *way)]
                line = sorted((_mean(rows, "compute") / 1000, _mean(rows, "top1")) for rows in of_way)
                style = {"marker": "osD^"[index // 10 % 4], "markersize": 4, "color": f"C{index}"}  # C10 is C0 again
                axis.plot([x for x, _ in line], [y for _, y in line], **style, label=", ".join(way))
            axis.set(title=f"{name}, {share:.0%} of the MACs", xlabel="compute, thousand forwards of the original")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("test top-1, %")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def _show(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
