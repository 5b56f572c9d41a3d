"""Models of other packages, small ones with random weights, by package: what the sweep of the ecosystem converts."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Build = Callable[[], tuple[nn.Module, Any]]  # returns a fresh model, and inputs as `convert` takes them


@dataclass(frozen=True)
class Package:
    """A package whose models are tried.

    Attributes:
        module: the name to import it by.
        file: the module of this package, with a dict `MODELS`, that builds its models.
    """

    module: str
    file: str

    def is_installed(self) -> bool:
        """Whether it can be imported; what it needs itself may still be missing."""
        return importlib.util.find_spec(self.module) is not None

    def list_models(self) -> Mapping[str, Build]:
        """Return its models by name."""
        models: Mapping[str, Build] = importlib.import_module(f"{__name__}.{self.file}").MODELS
        return models


PACKAGES = {
    "ultralytics": Package("ultralytics", "yolo"),
    "segmentation-models-pytorch": Package("segmentation_models_pytorch", "smp"),
    "transformers": Package("transformers", "huggingface"),
    "torchvision": Package("torchvision", "vision"),
    "vit-pytorch": Package("vit_pytorch", "vits"),
    "monai": Package("monai", "medical"),
    "kornia": Package("kornia", "geometry"),
    "open_clip_torch": Package("open_clip", "clip"),
    "x-transformers": Package("x_transformers", "xtransformers"),
}
