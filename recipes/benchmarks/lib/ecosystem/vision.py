"""torchvision's models for segmentation, video and optical flow, and what its detectors are made of."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import detection, optical_flow, segmentation, video

_SEGMENTERS = ("deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
_VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t")
_DETECTORS = (
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn"),
    *("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"),
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
)


class Maps(nn.Module):
    """A detector up to its maps of boxes and scores: detectors themselves take lists, of images of any size."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, getattr(detector, "rpn", detector).head

    def forward(self, images: torch.Tensor) -> Any:
        """Return what the head makes of images (N, C, H, W)."""
        return self.head(list(self.backbone(images).values()))


def _build_segmenter(name: str) -> tuple[nn.Module, Any]:
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3), torch.rand(1, 3, 64, 64)


def _build_video(name: str) -> tuple[nn.Module, Any]:
    side = 224 if name.startswith(("mvit", "s3d")) else 64
    return getattr(video, name)(weights=None, num_classes=5), torch.rand(1, 3, 16, side, side)


def _build_detector(name: str) -> tuple[nn.Module, Any]:
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3)
    return Maps(model), torch.rand(1, 3, *{"s": (320, 320)}.get(name[0], (128, 128)))


def _build_flow(name: str) -> tuple[nn.Module, Any]:
    pair = torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
    return getattr(optical_flow, name)(weights=None), pair


MODELS = {
    **{name: partial(_build_segmenter, name) for name in _SEGMENTERS},
    **{name: partial(_build_video, name) for name in _VIDEO},
    **{f"{name}, to its maps": partial(_build_detector, name) for name in _DETECTORS},
    **{name: partial(_build_flow, name) for name in ("raft_small", "raft_large")},
}
