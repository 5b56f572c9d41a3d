"""The model card of an exported folder: what the model is and costs, how to load it, and a figure of its channels."""

from __future__ import annotations

import importlib.util
import io
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from timm.models import PretrainedCfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_autoslim.artifact.bases import create_meta_base
from timm_autoslim.artifact.config import Config
from timm_autoslim.errors import ArtifactError
from timm_autoslim.tracing.outer_state import with_empty_caches
from timm_autoslim.utils.copying import copy_deeply

FIGURE = "widths.png"


def check_figures(card: Mapping[str, object] | None) -> dict[str, str]:
    """Return the user's figures as text, by label.

    Raises:
        ArtifactError: it is no mapping, a label is no text, or a value neither a number nor text.
    """
    rows: dict[str, str] = {}
    if not isinstance(card, Mapping | None):
        raise ArtifactError.at("card", got=reprlib.repr(card), needed="a mapping from labels to numbers or text")
    for label, value in (card or {}).items():
        if not isinstance(label, str) or not (isinstance(value, str | int | float) or value is None):
            raise ArtifactError.at(
                f"card {label!r}",
                got=reprlib.repr(value),
                needed="a number or text under a text label",
                remedy="flatten it",
            )
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        rows[label] = " ".join(text.split()).replace("|", "\\|")
    return rows


def create_comparable_base(config: Config) -> nn.Module:
    """Return the base of an exported model, with the model's head and input channels; on meta where that works."""
    args = {**config.spec.copy_arguments(), "num_classes": config.data.num_classes}
    channels = config.data.input_size[0]
    if channels != 3 or "in_chans" in args:
        args["in_chans"] = channels
    return create_meta_base(config.spec.require_base(), **args)


def count_costs(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Count `MACs` (one multiply-add each, of one image, on the meta device) and `parameters` of a model.

    The MACs are left out of the result where the forward cannot run on the meta device.
    """
    counts = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    try:
        meta_copy = copy_deeply(model).to("meta").eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            with_empty_caches(meta_copy, lambda _: meta_copy(torch.zeros(1, *input_size, device="meta")))
    except Exception:  # whatever a model raises there: the card says less
        return counts
    return {"MACs": counter.get_total_flops() // 2, **counts}


def write_card(
    path: Path, name: str, config: Config, figures: Mapping[str, str], model: nn.Module, timm_code: str
) -> None:
    """Write the card, and beside it the figure of the channels if matplotlib is installed.

    Args:
        path: of the card, in a folder that exists.
        name: the model's.
        config: the content of the folder's config.json.
        figures: by label, what the user wants to report.
        model: the slim model, or a meta copy of it.
        timm_code: the lines of code that load it without this package, or nothing.
    """
    spec, data = config.spec, config.data
    base = create_comparable_base(config)
    head = ["---", "library_name: timm", "pipeline_tag: image-classification", "tags:", "- timm", "- timm-autoslim"]
    if data.license:
        head.append(f"license: {data.license}")
    counts, base_counts = count_costs(model, data.input_size), count_costs(base, data.input_size)
    labels = [label for label in counts if label in base_counts]
    channels = list_channels(model, base)
    has_figure = bool(channels) and importlib.util.find_spec("matplotlib") is not None
    if has_figure:
        path.with_name(FIGURE).write_bytes(draw_channels(channels))
    lines = [
        *(*head, "---", "", f"# {name}", ""),
        f"`{spec.base}`, slimmed by timm-autoslim, in {len(spec.widths)} channel groups. Input: "
        f"{' x '.join(map(str, data.input_size))}. Classes: {data.num_classes}. How the model differs from its base is "
        "in `config.json`, under `spec`.",
        "",
        *(describe_preparation(data), ""),
        "",
        f"| | {' | '.join(labels)} |",
        f"| --- |{' --- |' * len(labels)}",
        f"| this model | {' | '.join(f'{counts[label]:,}' for label in labels)} |",
        f"| `{spec.base}` | {' | '.join(f'{base_counts[label]:,}' for label in labels)} |",
        "",
        *(["| Figure | Value |", "| --- | --- |"] if figures else []),
        *(f"| {label} | {value} |" for label, value in figures.items()),
        *([""] if figures else []),
        *([f"![Output channels of every layer, and of the base's]({FIGURE})", ""] if has_figure else []),
        *("## Load it", "", "```python", "import timm, timm_autoslim"),
        f"model = timm.create_model({json.dumps(f'local-dir:{name}', ensure_ascii=False)}, pretrained=True)",
        *("```", ""),
        *("`num_classes=`, `in_chans=`, `features_only=True` and timm's other arguments work as on the base.", ""),
        *(["With timm alone, in this folder:", "", "```python", timm_code, "```", ""] if timm_code else []),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def describe_preparation(data: PretrainedCfg) -> str:
    """Return how images are prepared, as sentences."""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (data.mean, data.std))
    crop = data.test_crop_pct or data.crop_pct
    size = f" {data.test_input_size[1]} x {data.test_input_size[2]} pixels," if data.test_input_size else ""
    return (
        f"For a test, images are prepared by timm:{size} {data.interpolation} resizing, {data.crop_mode} crop of "
        f"{100 * crop:.4g} %, mean {mean}, standard deviation {std}."
    )


def list_channels(model: nn.Module, base: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return how many output channels every layer that both have has in the base, and how many in the slim model."""
    layers = {n: p.shape[0] for n, p in base.named_parameters() if p.ndim > 1 and n.endswith("weight")}
    channels = {name: parameter.shape[0] for name, parameter in model.named_parameters()}
    return tuple((number, channels[name]) for name, number in layers.items() if name in channels)


def draw_channels(channels: Sequence[tuple[int, int]]) -> bytes:
    """Draw the output channels of every layer of a slim model over those of its base, as `list_channels` lists them.

    Returns:
        A picture as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.5), dpi=100)
    axes = figure.add_subplot()
    positions, last = range(len(channels)), len(channels) - 1
    axes.fill_between(positions, [number for number, _ in channels], step="mid", color="0.85", label="base")
    axes.fill_between(positions, [number for _, number in channels], step="mid", color="tab:blue", label="this model")
    axes.set(xlabel="layer", ylabel="output channels", xlim=(0, max(1, last)), ylim=(0, None))
    axes.set_xticks([*{0, len(channels) // 2, last}])
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, bbox_inches="tight", metadata={"Software": None})
    return picture.getvalue()
