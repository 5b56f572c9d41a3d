"""The models that benchmarks run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from tqdm import tqdm

from timm_autoslim import calibrate, convert, create_base, create_meta_base, export


def list_names(smallest: bool) -> list[str]:
    """Return the names of timm's models and of torchvision's classifiers, or of the smallest model of each class."""
    names: list[str] = timm.list_models(exclude_filters="autoslim")
    names += [f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    if not smallest:
        return names
    best: dict[str, tuple[int, str]] = {}
    for name in tqdm(names, desc="smallest of each class"):
        model = create_meta_base(name)
        key = f"{type(model).__module__}.{type(model).__name__}"
        best[key] = min(best.get(key, (1 << 60, "")), (sum(p.numel() for p in model.parameters()), name))
    return sorted(name for _, name in best.values())


def export_half(name: str, folder: Path) -> nn.Module:
    """Export a model of timm, or torchvision/NAME, with random weights and half of its widths; return the base."""
    torch.manual_seed(0)
    model = create_base(name).eval()
    if not folder.exists():
        supernet = convert(model, base=name)
        half = supernet.extract(supernet.space.uniform(0.5))
        config: Any = half.pretrained_cfg
        calibrate(half, [torch.rand(2, *config["input_size"])])
        export(half, folder)
    return model
