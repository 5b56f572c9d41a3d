"""What a step of a benchmark takes: CPU seconds, and compute as images times MACs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """What something took: CPU seconds, and compute in forwards of the original for one image."""

    seconds: float = 0.0
    compute: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.seconds + other.seconds, self.compute + other.compute)


def count_backward(
    outputs: tuple[int, ...], inputs: tuple[int, ...], weight: tuple[int, ...], *options: Any, out_shape: Any = None
) -> int:
    """Return the floating-point operations of a convolution's backward, for each of its gradients those of the forward.

    torch's own count takes grouped convolutions for dense ones.
    """
    return int(2 * math.prod(outputs) * math.prod(weight[1:]) * sum(options[-1][:2]))


def count_effort(act: Callable[[], T], original_macs: int) -> tuple[T, Effort]:
    """Return what a function returns, and what it took; `original_macs` are the MACs of the original for one image."""
    start = time.process_time()
    backward: Any = {torch.ops.aten.convolution_backward: count_backward}
    with FlopCounterMode(display=False, custom_mapping=backward) as counter:
        result = act()
    return result, Effort(time.process_time() - start, counter.get_total_flops() / 2 / original_macs)
