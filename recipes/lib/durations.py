"""How long stages take: measured, estimated and written."""

from __future__ import annotations

import copy
import time

from torch import Tensor, nn


def time_step(model: nn.Module, images: Tensor) -> float:
    """Return the seconds of one forward and backward pass of a copy of a model, on images (N, C, H, W)."""
    worker = copy.deepcopy(model).eval()
    for _ in range(2):  # the first one is slower
        begin = time.perf_counter()
        loss = worker(images).sum()
        loss.backward()
        loss.item()  # waits for a GPU
        spent = time.perf_counter() - begin
    return spent


def write_time(seconds: float) -> str:
    """Return a duration in the unit that suits it, such as "12 min"."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
