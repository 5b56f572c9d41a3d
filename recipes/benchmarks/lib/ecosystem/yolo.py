"""Detectors and their kin of ultralytics, from the configurations that it carries."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from ultralytics import RTDETR, YOLO

_NAMES = (
    *(
        "yolov3-tiny",
        "yolov5n",
        "yolov5s",
        "yolov5n-p6",
        "yolov6n",
        "yolov8n",
        "yolov8s",
        "yolov8n-seg",
        "yolov8n-pose",
    ),
    *("yolov8n-obb", "yolov8n-cls", "yolov8n-ghost", "yolov8n-p2", "yolov8n-p6", "yolov9t", "yolov9s", "yolov9c-seg"),
    *("yolov10n", "yolov10s", "yolo11n", "yolo11s", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls"),
    *("yolo12n", "yolo12n-seg", "yolo12n-cls", "yolo26n", "yolo26n-seg", "yolo26n-pose", "yolo26n-obb"),
    *("yolo26n-cls", "yolo26n-depth", "yolo26n-sem", "rtdetr-l", "rtdetr-resnet50"),
)


def _build(name: str) -> tuple[nn.Module, Any]:
    maker = RTDETR if name.startswith("rtdetr") else YOLO
    return maker(f"{name}.yaml").model, torch.rand(1, 3, 128, 128)


MODELS = {name: partial(_build, name) for name in _NAMES}
