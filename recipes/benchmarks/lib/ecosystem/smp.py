"""Segmenters of segmentation_models_pytorch: each architecture, and U-Nets on many encoders."""

from __future__ import annotations

from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn

_ARCHITECTURES = (
    *("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "Linknet", "MAnet", "PAN", "UPerNet"),
    "Segformer",
)
_ENCODERS = (
    *("mobilenet_v2", "efficientnet-b0", "vgg11_bn", "densenet121", "se_resnet50", "dpn68", "xception", "inceptionv4"),
    *("inceptionresnetv2", "mit_b0", "mobileone_s0", "timm-efficientnet-b0", "timm-skresnet18", "resnext50_32x4d"),
    *("tu-resnet10t", "tu-mobilenetv3_small_100", "tu-convnext_atto", "tu-regnetx_002"),
)


def _build(kind: str, encoder: str, side: int = 64) -> tuple[nn.Module, Any]:
    model = getattr(smp, kind)(encoder, encoder_weights=None, classes=3)
    return model, torch.rand(1, 3, side, side)


MODELS = {
    **{f"{kind} resnet18": partial(_build, kind, "resnet18", 128) for kind in _ARCHITECTURES},
    **{f"Unet {encoder}": partial(_build, "Unet", encoder) for encoder in _ENCODERS},
    "DPT tu-vit_tiny_patch16_224": lambda: _build("DPT", "tu-vit_tiny_patch16_224", 224),
    "DeepLabV3Plus mobilenet_v2": lambda: _build("DeepLabV3Plus", "mobilenet_v2"),
    "FPN mit_b0": lambda: _build("FPN", "mit_b0"),
}
