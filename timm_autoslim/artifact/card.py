"""The model card of an exported folder: what the model is and costs, how to load it, and a figure of its widths."""

from __future__ import annotations

import copy
import importlib.util
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_autoslim.artifact.bases import create_hollow
from timm_autoslim.errors import ArtifactError

FIGURE = "widths.png"


def check_figures(card: Mapping[str, object] | None) -> dict[str, str]:
    """Return the user's figures as text, by label.

    Raises:
        ArtifactError: it is no mapping, a label is no text, or a value neither a number nor text.
    """
    rows: dict[str, str] = {}
    if not isinstance(card, Mapping | None):
        raise ArtifactError(f"card: got {reprlib.repr(card)}, needed a mapping from labels to numbers or text")
    for label, value in (card or {}).items():
        if not isinstance(label, str) or not (isinstance(value, str | int | float) or value is None):
            raise ArtifactError(
                f"card {label!r}: got {reprlib.repr(value)}, needed a number or text under a text label; flatten it"
            )
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        rows[label] = " ".join(text.split()).replace("|", "\\|")
    return rows


def make_base(recipe: Mapping[str, Any], num_classes: int, in_chans: int) -> nn.Module:
    """Return the base of a recipe, with the slimmed model's head and input channels; without data where that works."""
    args = {**recipe["base_args"], "num_classes": num_classes}
    if in_chans != 3 or "in_chans" in args:
        args["in_chans"] = in_chans
    return create_hollow(recipe["base"], **args)


def measure(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Count `MACs` (one multiply-add each, of one image, without a run on data) and `parameters` of a model.

    The MACs are left out of the result where the forward cannot run on the meta device.
    """
    found = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    try:
        hollow = copy.deepcopy(model).to("meta").eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            hollow(torch.zeros(1, *input_size, device="meta"))
    except Exception:  # whatever a model raises there: the card says less
        return found
    return {"MACs": counter.get_total_flops() // 2, **found}


def write_card(
    path: Path, name: str, config: Mapping[str, Any], figures: Mapping[str, str], plain: nn.Module, plain_timm: str
) -> None:
    """Write the card, and beside it the figure of the widths if matplotlib is installed.

    Args:
        path: of the card; its folder is there.
        name: the model's.
        config: the content of the folder's config.json.
        figures: by label, what the user wants to say.
        plain: the slimmed model; its data are not read.
        plain_timm: the lines that load it without this package, or nothing.
    """
    recipe, cfg = config["model_args"]["recipe"], config["pretrained_cfg"]
    base = make_base(recipe, config["num_classes"], cfg["input_size"][0])
    head = ["---", "library_name: timm", "pipeline_tag: image-classification", "tags:", "- timm", "- timm-autoslim"]
    if cfg.get("license"):
        head.append(f"license: {cfg['license']}")
    size = tuple(cfg["input_size"])
    mine, whole = measure(plain, size), measure(base, size)
    labels = [label for label in mine if label in whole]
    drawn = draw_widths(path.with_name(FIGURE), plain, base)
    lines = [
        *(*head, "---", "", f"# {name}", ""),
        f"`{recipe['base']}`, slimmed by timm-autoslim. Channel groups that are narrower than in the base: "
        f"{len(recipe['widths'])}. Input: {' x '.join(map(str, size))}. Classes: {config['num_classes']}. "
        "The recipe is in `config.json`.",
        "",
        f"| | {' | '.join(labels)} |",
        f"| --- |{' --- |' * len(labels)}",
        f"| this model | {' | '.join(f'{mine[label]:,}' for label in labels)} |",
        f"| `{recipe['base']}` | {' | '.join(f'{whole[label]:,}' for label in labels)} |",
        "",
        *(["| Figure | Value |", "| --- | --- |"] if figures else []),
        *(f"| {label} | {value} |" for label, value in figures.items()),
        *([""] if figures else []),
        *([f"![Output channels of every layer, and of the base's]({FIGURE})", ""] if drawn else []),
        *("## Load it", "", "```python", "import timm, timm_autoslim"),
        f"model = timm.create_model({json.dumps(f'local-dir:{name}', ensure_ascii=False)}, pretrained=True)",
        *("```", ""),
        *("`num_classes=`, `in_chans=`, `features_only=True` and timm's other arguments work as on the base.", ""),
        *(["With timm alone, in this folder:", "", "```python", plain_timm, "```", ""] if plain_timm else []),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def draw_widths(path: Path, plain: nn.Module, base: nn.Module) -> bool:
    """Draw the output channels of every layer of a slimmed model over those of its base.

    Returns:
        Whether there is a figure: not without matplotlib, and not without layers.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    layers = {n: p.shape[0] for n, p in base.named_parameters() if p.ndim > 1 and n.endswith("weight")}
    mine = {name: parameter.shape[0] for name, parameter in plain.named_parameters()}
    pairs = [(n, size, mine[n]) for n, size in layers.items() if n in mine]
    if not pairs:
        return False
    figure = Figure(figsize=(8, 2.5), dpi=100)
    axes = figure.add_subplot()
    places = range(len(pairs))
    axes.fill_between(places, [size for _, size, _ in pairs], step="mid", color="0.85", label="base")
    axes.fill_between(places, [kept for _, _, kept in pairs], step="mid", color="tab:blue", label="this model")
    axes.set(xlabel="layer", ylabel="output channels", xlim=(0, max(1, len(pairs) - 1)), ylim=(0, None))
    axes.set_xticks([*{0, len(pairs) // 2, len(pairs) - 1}])
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    return True
