"""An exported folder for plain timm: its own format of pruned models, where that can say the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._prune import adapt_model_from_string
from torch import nn

from timm_autoslim.artifact.compare import difference
from timm_autoslim.artifact.construct import TORCHVISION

PRUNED = "pruned.txt"
_SAID = ("num_features", "head_hidden_size", "num_classes", "feature_info")


def write_pruned(
    path: Path, plain: nn.Module, recipe: Mapping[str, Any], settings: Mapping[str, Any], size: Sequence[int]
) -> str:
    """Write timm's text of a pruned model, if timm alone makes the same model of it: same tensors, output and widths.

    The text knows convolutions without groups or one for each channel, BatchNorm2d and linear layers. timm reads such
    texts only from its own package, so a folder of `local-dir:` cannot name one: three lines of code read it.

    Args:
        path: of the text.
        plain: the slimmed model, on the CPU in float32 if the text is to be written.
        recipe: its recipe.
        settings: what was changed since the base was created, as arguments of `timm.create_model`.
        size: the shape (C, H, W) of an image that it is made for.

    Returns:
        The lines that load it with plain timm, run in its folder; empty if there is no text.
    """
    args = {**recipe["base_args"], **settings}
    state = plain.state_dict()
    floats = {(value.device.type, value.dtype) for value in state.values() if value.is_floating_point()}
    if recipe["base"].startswith(TORCHVISION) or floats != {("cpu", torch.float32)}:
        return ""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    text = "***".join(f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items() if shape)
    try:
        with torch.device("meta"):  # most texts fail here, where it is cheap
            hollow = adapt_model_from_string(timm.create_model(recipe["base"], **args), text)
        if {name: tuple(value.shape) for name, value in hollow.state_dict().items()} != shapes:
            return ""
        again = adapt_model_from_string(timm.create_model(recipe["base"], **args), text)
        again.load_state_dict(state)
        if any(_said(plain, name) != _said(again, name) for name in _SAID) or difference(plain, again, size):
            return ""
    except Exception:  # timm's function may raise anything on what its format cannot say
        return ""
    path.write_text(text, encoding="utf-8")
    given = "".join(f", {name}={value!r}" for name, value in json.loads(json.dumps(args)).items())
    return (
        "import timm\nfrom safetensors.torch import load_file\nfrom timm.models._prune import adapt_model_from_string\n"
        f'base = timm.create_model("{recipe["base"]}"{given})\n'
        f'model = adapt_model_from_string(base, open("{PRUNED}").read())\n'
        'model.load_state_dict(load_file("model.safetensors"))'
    )


def _said(model: nn.Module, name: str) -> object:
    said = getattr(model, name, None)
    return getattr(said, "info", said)
