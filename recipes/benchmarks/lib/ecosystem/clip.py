"""open_clip: whole models of images and texts, and towers of images alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import torch
from torch import nn

_PAIRS = ("ViT-S-32-alt", "RN50", "MobileCLIP2-S0", "ViT-M-32-alt")
_TOWERS = ("ViT-B-32", "convnext_tiny", "ViTamin-S", "vit_medium_patch16_gap_256", "PE-Core-T-16-384", "EVA02-B-16")


def _build(name: str, tower: bool) -> tuple[nn.Module, Any]:
    model: Any = open_clip.create_model(name, pretrained=None)
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    images = torch.rand(1, 3, side, side)
    return (model.visual, images) if tower else (model, (images, torch.randint(1, 400, (1, model.context_length))))


MODELS = {
    **{name: partial(_build, name, False) for name in _PAIRS},
    **{f"{name}.visual": partial(_build, name, True) for name in _TOWERS},
}
