"""How images are prepared for a model: its `pretrained_cfg` says so, to timm, to export and to the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# What belongs to one size of images, and is wrong for another.
OF_SIZE = ("test_input_size", "test_crop_pct", "pool_size", "test_pool_size")


def write_input_size(model: nn.Module, size: Sequence[int]) -> None:
    """Let a model's `pretrained_cfg` say which size of images the model is for.

    The model gets settings of its own; other models that share the old ones keep them. What belongs to another size of
    images is dropped.

    Args:
        model: whose settings are replaced.
        size: (C, H, W) of an image.
    """
    settings: Any = getattr(model, "pretrained_cfg", None)
    settings = settings if isinstance(settings, Mapping) else {}
    before = tuple(settings.get("input_size") or ())
    if before == tuple(size):
        return
    dropped = OF_SIZE if before[1:] != tuple(size[1:]) else ()
    changed: Any = {key: value for key, value in settings.items() if key not in dropped}
    changed["input_size"] = tuple(size)
    model.pretrained_cfg = changed
    model.default_cfg = changed  # timm's older name


def find_image_size(example: Any) -> tuple[int, int, int] | None:
    """Return the size (C, H, W) of the images in an example (N, C, H, W); None if it is anything else."""
    if isinstance(example, tuple | list) and len(example) == 1:
        return find_image_size(example[0])
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
        return None
    channels, height, width = example.shape[1:]
    return channels, height, width


def merge_settings(settings: Mapping[str, Any], base: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return a model's settings, completed by those of its base, that agree with each other.

    Args:
        settings: the model's `pretrained_cfg`, or an empty mapping. If it has an `input_size`, it alone says what goes
            with a size of images. What is still the base's is dropped if the size is not the base's.
        base: the `pretrained_cfg` of the base, as it was built.
        channels: of the images.
    """
    complete = {**base, **settings}
    sides, built = tuple(complete["input_size"][1:]), tuple(base["input_size"][1:])
    for key in OF_SIZE:
        if settings.get("input_size") and (key not in settings or (sides != built and settings[key] == base.get(key))):
            complete.pop(key, None)
    complete["input_size"] = (channels, *sides)
    for key in ("test_input_size", "min_input_size"):
        if complete.get(key):
            complete[key] = (channels, *complete[key][1:])
    smallest = complete.get("min_input_size")
    if smallest and (smallest[1] > sides[0] or smallest[2] > sides[1]):
        del complete["min_input_size"]
    for key in ("mean", "std"):
        values = complete.get(key)
        if values and len(values) != channels:  # of a base for images of other channels
            complete[key] = (sum(values) / len(values),) * channels
    if complete.get("fixed_input_size") and sides != built:
        complete["fixed_input_size"] = False  # the model runs at another size than it was built for
    return complete


def measure_pool_size(model: nn.Module, size: Sequence[int]) -> tuple[int, int] | None:
    """Return (H, W) of the map that a timm model pools before its head; None if there is no such map.

    Args:
        model: on the meta device, or with data; it stays as it is.
        size: (C, H, W) of an image.
    """
    forward: Any = getattr(model, "forward_features", None)
    device = next((parameter.device for parameter in model.parameters()), None)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features = forward(torch.zeros(1, *size, device=device))
    except Exception:  # whatever a model raises on an image of this size, or on the meta device
        return None
    finally:
        model.train(training)
    if not isinstance(features, Tensor) or features.dim() != 4:
        return None
    layout = getattr(model, "output_fmt", "NCHW")
    height, width = features.shape[1:3] if getattr(layout, "value", layout) == "NHWC" else features.shape[2:]
    return height, width
