"""One table of slim networks, with the original in its first row."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator

from timm_autoslim import Accuracy, Found, files, measure_turns, write_amount
from timm_autoslim.errors import ArtifactError, ConfigError
from timm_autoslim.recipes.lib.images import Images
from timm_autoslim.recipes.lib.loaders import make_evaluation_loader
from timm_autoslim.recipes.lib.models import load_supernet, make_images
from timm_autoslim.recipes.lib.onnx_file import write_onnx
from timm_autoslim.recipes.lib.run_folder import write_json
from timm_autoslim.recipes.lib.validation import evaluate

ORIGINAL = "original.json"  # of a run folder
TURNS = 9  # in which each network is measured
_QUIET = 0.9  # share of the time that a process has the processor where nothing else runs
# Share of the test images, or number, that may change sides: other kernels may run on other batches of other devices.
_OTHER_SIDE = 0.001, 3
_SAME = 0.02  # shares of a latency that differ by less are told as one


@dataclass(frozen=True)
class Row:
    """What one network is and is worth.

    Attributes:
        name: of the network.
        top1: on the test images, in per cent.
        macs, params: of the network, for one image.
        file_bytes: of its weights.
        latency_ms: as measured; None before it is.
        latency_quartiles: between which half of the measurements lie.
        latency_shares: the same, of what it takes of the original's time in the same turn.
    """

    name: str
    top1: float
    macs: int
    params: int
    file_bytes: int
    latency_ms: float | None = None
    latency_quartiles: tuple[float, float] | None = None
    latency_shares: tuple[float, float] | None = None


def write_original(run: Path, row: Row) -> None:
    """Write what the original is worth; its latency is measured anew beside the networks."""
    write_json(run / ORIGINAL, asdict(row))


def read_original(run: Path) -> Row | None:
    """Read what `write_original` wrote; None if the original was not tested yet.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run / ORIGINAL
    if not path.is_file():
        return None
    try:
        return Row(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove it, and the original is tested again.") from error


def check_accuracy(exported: Path, top1: float, images: int) -> None:
    """Make sure that a network which was loaded again has the accuracy of before.

    Args:
        exported: its folder, with the result of before.
        top1: accuracy of now, in per cent.
        images: number of test images.

    Raises:
        ArtifactError: it has not.
    """
    result = Accuracy.load(exported)
    changed = 0 if result is None else round(abs(top1 - result.top1) * images / 100)
    if result is None or changed > max(_OTHER_SIDE[0] * images, _OTHER_SIDE[1]):
        before = "no accuracy" if result is None else f"{result.top1:.2f} %"
        raise ArtifactError(
            f"{exported} has {top1:.2f} % of {images} test images when it is loaded again, and had {before}, "
            f"{changed} images more or less: it changed. Remove it, and it is fine-tuned again."
        )


def compare_networks(
    accelerator: Accelerator, args: argparse.Namespace, run: Path, images: Images, networks: Sequence[Found]
) -> str:
    """Load every network of a run again, test it and measure it beside the original; return the table, and write it.

    With `--onnx` their ONNX files are written too. All processes test; the first measures and writes, and the others
    return an empty text.

    Raises:
        ArtifactError: a network has another accuracy than before.
    """
    original = read_original(run)
    assert original is not None
    loader = accelerator.prepare(make_evaluation_loader(args, images.test))
    rows, models = [original], [load_supernet(run, args).model]
    for network in networks:
        exported = run / "exported" / network.name
        model = timm.create_model(f"local-dir:{exported}", pretrained=True).to(accelerator.device)
        top1 = evaluate(accelerator, model, loader, network.name)["top1"]
        check_accuracy(exported, top1, len(images.test))
        size = (exported / "model.safetensors").stat().st_size
        rows.append(Row(network.name, top1, network.cost.macs, network.cost.params, size))
        models.append(model.cpu())
    if not accelerator.is_main_process:
        return ""
    if args.onnx:
        pair = torch.cat([inputs for inputs, _ in make_evaluation_loader(args, images.test, range(2))])
        for network in networks:
            write_onnx(run / "exported" / network.name, pair, run / "onnx" / f"{network.name}.onnx")
    with _watch_processor(args.latency_device) as notes:
        turns = measure_turns(
            models, make_images(args, args.cost_batch_size), device=args.latency_device, runtime=args.latency_runtime,
            threads=args.latency_threads, rounds=TURNS, repeats=5,
        )  # fmt: skip
    first, *others = [replace(row, **describe_turns(times, turns[0])) for row, times in zip(rows, turns, strict=True)]
    table = make_table(first, others) + "".join(f"\n{note}\n" for note in notes)
    files.write_text(run / "table.md", table)
    return table


@contextlib.contextmanager
def _watch_processor(device: str) -> Iterator[list[str]]:
    """Note, after a block that measures on a CPU, if other work took the processor from this process meanwhile."""
    notes: list[str] = []
    wall, busy = time.perf_counter(), time.process_time()
    yield notes
    share = (time.process_time() - busy) / max(time.perf_counter() - wall, 1e-9)
    if torch.device(device).type == "cpu" and share < _QUIET:
        notes.append(
            f"Warning: other work had the processor for {1 - share:.0%} of the time in which latencies were measured: "
            "they may be too long, and not by the same factor. The same command measures them again."
        )


def make_table(original: Row, networks: Sequence[Row]) -> str:
    """Return a Markdown table: the original, then each network with what it lost and saved."""
    lines = [
        "| network | test top-1 | lost | MACs | params | file | latency |",
        "|---|---|---|---|---|---|---|",
        f"| {original.name} | {original.top1:.2f} | | {write_amount(original.macs, 2)} | "
        f"{write_amount(original.params, 3)} | {original.file_bytes / 1e6:.2f} MB | {_write_latency(original)} |",
    ]
    for row in networks:
        cells = [
            f"{write_amount(row.macs, 2)} ({row.macs / original.macs:.0%})",
            f"{write_amount(row.params, 3)} ({row.params / original.params:.0%})",
            f"{row.file_bytes / 1e6:.2f} MB ({row.file_bytes / original.file_bytes:.0%})",
            _write_latency(row) + _write_share(row, original),
        ]
        lost = original.top1 - row.top1
        lines.append(f"| {row.name} | {row.top1:.2f} | {lost:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe_turns(times: Sequence[float], original: Sequence[float]) -> dict[str, Any]:
    """Return the median and the quartiles of the turns in which a network was measured, as fields of a row.

    Args:
        times: of the network, in each turn.
        original: times of the original in the same turns, in which the machine was as busy.
    """
    shares = [time / reference for time, reference in zip(times, original, strict=True)]
    return {
        "latency_ms": statistics.median(times),
        "latency_quartiles": _find_quartiles(times),
        "latency_shares": _find_quartiles(shares),
    }


def _find_quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(numbers, n=4)
    return low, high


def _write_latency(row: Row) -> str:
    if row.latency_ms is None:
        return ""
    low, high = row.latency_quartiles or (None, None)
    spread = "" if low is None else f" [{low:.3g}, {high:.3g}]"
    return f"{row.latency_ms:.3g} ms{spread}"


def _write_share(row: Row, original: Row) -> str:
    """Return what a network takes of the original's time: one number, or a range where the turns do not agree."""
    if row.latency_ms is None or original.latency_ms is None:
        return ""
    low, high = row.latency_shares or (0.0, 0.0)
    one = f"{row.latency_ms / original.latency_ms:.0%}"
    return f" ({one})" if high - low < _SAME else f" ({100 * low:.0f} to {high:.0%})"
