"""Images that benchmarks train and test on, as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

Images = tuple[Tensor, Tensor]  # (N, C, H, W) and classes (N,)


def load_digits() -> Images:
    """Return scikit-learn's digits as images (N, 3, 32, 32) in -1 to 1, and their classes (N,)."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (N, 1, 8, 8)
    return F.interpolate(images, 32).expand(-1, 3, -1, -1).contiguous(), torch.tensor(digits.target)


def read_images(path: Path, count: int | None = None, seed: int = 0, size: int | None = None) -> Images:
    """Return images of class folders, or of one .tar file of them, in a random order: bytes (N, 3, H, W), classes (N,).

    Args:
        path: the folder or the file.
        count: how many images; None is all.
        seed: of the order.
        size: their side; None leaves them, and then all must have one size.
    """
    dataset = timm.data.create_dataset("", root=str(path))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    pixels, targets = [], []
    for index in chosen:
        image, target = dataset[index]
        image = image.convert("RGB")
        pixels.append(np.asarray(image if size is None else image.resize((size, size), Image.Resampling.BICUBIC)))
        targets.append(target)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(targets)


def find_part(folder: Path, name: str) -> Path:
    """Return the .tar file or folder of one part of the images."""
    return folder / f"{name}.tar" if (folder / f"{name}.tar").exists() else folder / name


@torch.no_grad()
def measure_top1(model: nn.Module, images: Images, batch: int = 250) -> float:
    """Return the top-1 accuracy in per cent; the model is in evaluation mode afterwards."""
    outputs = torch.cat([model.eval()(part) for part in torch.split(images[0], batch)])  # (N, classes)
    return 100 * int((outputs.argmax(1) == images[1]).sum()) / len(outputs)
