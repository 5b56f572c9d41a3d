"""transformers' vision models, from their configurations with few layers and small images."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

_LAYERS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_encoder_blocks_layers")


def _build(name: str, side: int = 64, shape: tuple[int, ...] = (), **settings: Any) -> tuple[nn.Module, Any]:
    """Return a model and images; `name` is that of the class."""
    kind = getattr(transformers, name)
    config = kind.config_class()
    for key, value in {**_shrink(config, side), **settings}.items():
        setattr(config, key, value)
    return kind(config), torch.rand(1, *(shape or (getattr(config, "num_channels", 3), side, side)))


def _shrink(config: Any, side: int) -> dict[str, Any]:
    """Return settings of a configuration that make its model shallow and for small images."""
    names = () if hasattr(config, "depths") else _LAYERS
    settings: dict[str, Any] = {key: 2 for key in names if isinstance(getattr(config, key, None), int)}
    if isinstance(getattr(config, "image_size", None), int):
        settings["image_size"] = side
    if isinstance(getattr(config, "image_size", None), list | tuple):
        settings["image_size"] = type(config.image_size)(side for _ in config.image_size)
    if isinstance(getattr(config, "depths", None), list | tuple):
        settings["depths"] = [min(2, n) for n in config.depths]
    return settings


def _build_pair(name: str) -> tuple[nn.Module, Any]:
    """Return a model of images and texts."""
    kind = getattr(transformers, name)
    config = kind.config_class()
    for part in (config.vision_config, config.text_config):
        part.num_hidden_layers, part.vocab_size = 2, 1000
        part.eos_token_id, part.bos_token_id, part.pad_token_id = 2, 0, 1
    config.vision_config.image_size = 64
    size = config.vision_config.image_size
    texts = torch.tensor([[0, 5, 6, 7, 8, 9, 2]])
    return kind(config), {"input_ids": texts, "pixel_values": torch.rand(1, 3, size, size)}


_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "BeitForImageClassification": {},
    "BitForImageClassification": {},
    "ConvNextForImageClassification": {},
    "ConvNextV2ForImageClassification": {},
    "CvtForImageClassification": {"depth": [1, 2, 3]},
    "Data2VecVisionForImageClassification": {},
    "DeiTForImageClassification": {},
    "Dinov2ForImageClassification": {"side": 56},
    "Dinov2WithRegistersForImageClassification": {"side": 56},
    "EfficientNetForImageClassification": {
        "side": 64,
        "depth_coefficient": 1.0,
        "width_coefficient": 1.0,
        "hidden_dim": 1280,
    },
    "FocalNetForImageClassification": {},
    "HGNetV2ForImageClassification": {},
    "HieraForImageClassification": {"side": 224, "image_size": [224, 224]},
    "IJepaForImageClassification": {"side": 56},
    "LevitForImageClassification": {"side": 224, "depths": [1, 1, 1]},
    "MobileNetV1ForImageClassification": {},
    "MobileNetV2ForImageClassification": {},
    "MobileViTForImageClassification": {"side": 256},
    "MobileViTV2ForImageClassification": {"side": 256},
    "PoolFormerForImageClassification": {},
    "PPLCNetForImageClassification": {},
    "PvtForImageClassification": {"side": 64},
    "PvtV2ForImageClassification": {"side": 64},
    "RegNetForImageClassification": {},
    "ResNetForImageClassification": {},
    "SegformerForImageClassification": {},
    "SwiftFormerForImageClassification": {"side": 224},
    "SwinForImageClassification": {"side": 224},
    "Swinv2ForImageClassification": {"side": 256, "window_size": 8},
    "TextNetForImageClassification": {},
    "ViTForImageClassification": {},
    "ViTMSNForImageClassification": {},
    "DonutSwinForImageClassification": {"side": 224},
}
_OTHERS: dict[str, dict[str, Any]] = {
    "ViTMAEModel": {},
    "VitDetBackbone": {"out_features": ["stage2", "stage4"]},
    "DINOv3ViTModel": {},
    "DINOv3ConvNextModel": {},
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "SegformerForSemanticSegmentation": {},
    "MobileNetV2ForSemanticSegmentation": {},
    "MobileViTForSemanticSegmentation": {"side": 256},
    "MobileViTV2ForSemanticSegmentation": {"side": 256},
    "UperNetForSemanticSegmentation": {"side": 128},
    "DPTForDepthEstimation": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "DepthAnythingForDepthEstimation": {"side": 56},
    "GLPNForDepthEstimation": {},
    "ZoeDepthForDepthEstimation": {"side": 64},
    "Swin2SRForImageSuperResolution": {"side": 64, "depths": [1, 1], "num_heads": [6, 6]},
    "SuperPointForKeypointDetection": {},
    "TimesformerForVideoClassification": {"shape": (8, 3, 64, 64)},
    "VideoMAEForVideoClassification": {"shape": (16, 3, 64, 64)},
    "VivitForVideoClassification": {"shape": (32, 3, 64, 64)},
    "VJEPA2Model": {"shape": (4, 3, 64, 64), "crop_size": 64, "frames_per_clip": 4, "pred_num_hidden_layers": 1},
    "YolosForObjectDetection": {},
    "DetrForObjectDetection": {},
    "ConditionalDetrForObjectDetection": {},
    "DabDetrForObjectDetection": {},
    "DeformableDetrForObjectDetection": {"side": 128},
    "TableTransformerForObjectDetection": {},
    "RTDetrForObjectDetection": {"side": 128, "num_queries": 20},
    "RTDetrV2ForObjectDetection": {"side": 128, "num_queries": 20},
    "DFineForObjectDetection": {"side": 128, "num_queries": 20},
    "MaskFormerForInstanceSegmentation": {"side": 128},
    "Mask2FormerForUniversalSegmentation": {"side": 128},
    "EomtForUniversalSegmentation": {"num_hidden_layers": 4, "num_blocks": 2},
}
_PAIRS = ("CLIPModel", "SiglipModel", "MetaClip2Model", "BlipModel")


def _build_clip_classifier() -> tuple[nn.Module, Any]:
    config = transformers.CLIPConfig()
    config.vision_config.image_size, config.vision_config.num_hidden_layers = 64, 2
    return transformers.CLIPForImageClassification(config), torch.rand(1, 3, 64, 64)


MODELS = {
    **{name: partial(_build, name, **settings) for name, settings in {**_CLASSIFIERS, **_OTHERS}.items()},
    **{name: partial(_build_pair, name) for name in _PAIRS},
    "CLIPForImageClassification": _build_clip_classifier,
}
