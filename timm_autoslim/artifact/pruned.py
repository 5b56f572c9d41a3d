"""A text beside the weights by which timm alone loads them, where timm's own format of pruned models is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._prune import adapt_model_from_string
from torch import nn

from timm_autoslim.artifact.compare import find_difference
from timm_autoslim.artifact.spec import Spec

PRUNED = "pruned.txt"
_DESCRIPTIONS = ("num_features", "head_hidden_size", "num_classes", "feature_info")


def write_pruned(path: Path, model: nn.Module, spec: Spec, settings: Mapping[str, Any], size: Sequence[int]) -> str:
    """Write timm's text of a pruned model, if timm alone makes the same model of it: same tensors, output and widths.

    The text can describe convolutions without groups or with one for each channel, BatchNorm2d and linear layers. timm
    reads such texts only from its own package, so the config.json of a folder cannot name one: six lines of code read
    it.

    Args:
        path: of the text.
        model: the slim model, on the CPU in float32 if the text is to be written.
        spec: its spec.
        settings: what was changed since the base was created, as arguments of `timm.create_model`.
        size: the shape (C, H, W) of an image that it is made for.

    Returns:
        The lines of code that load it with timm alone, run in its folder; empty if there is no text.
    """
    base, args = spec.require_base(), {**spec.copy_arguments(), **settings}
    state = model.state_dict()
    floats = {(value.device.type, value.dtype) for value in state.values() if value.is_floating_point()}
    if spec.from_torchvision or floats != {("cpu", torch.float32)}:
        return ""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    text = "***".join(f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items() if shape)
    try:
        with torch.device("meta"):  # most texts fail here, where it is cheap
            meta_copy = adapt_model_from_string(timm.create_model(base, **args), text)
        if {name: tuple(value.shape) for name, value in meta_copy.state_dict().items()} != shapes:
            return ""
        pruned = adapt_model_from_string(timm.create_model(base, **args), text)
        pruned.load_state_dict(state)
        same = all(_describe(model, name) == _describe(pruned, name) for name in _DESCRIPTIONS)
        if not same or find_difference(model, pruned, size):
            return ""
    except Exception:  # timm's function may raise anything on models that its format cannot describe
        return ""
    path.write_text(text, encoding="utf-8")
    arguments = "".join(f", {name}={value!r}" for name, value in args.items())
    return (
        "import timm\nfrom safetensors.torch import load_file\nfrom timm.models._prune import adapt_model_from_string\n"
        f'base = timm.create_model("{base}"{arguments})\n'
        f'model = adapt_model_from_string(base, open("{PRUNED}").read())\n'
        'model.load_state_dict(load_file("model.safetensors"))'
    )


def _describe(model: nn.Module, name: str) -> object:
    value = getattr(model, name, None)
    return getattr(value, "info", value)
