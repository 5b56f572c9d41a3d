"""How long stages take: measured, estimated and written."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor, nn

from timm_autoslim import Stage, Supernet, estimate_subnets
from timm_autoslim.recipes.lib.models import make_images


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


class Stages:
    """Says which stage of how many begins, and how long each took.

    Attributes:
        count: how many there are; to be set before the first one.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.count = accelerator, 0
        self._begin = time.perf_counter()
        self._begun: list[float] = []

    def announce(self, text: str) -> None:
        """Say that the next stage begins."""
        self._begun.append(time.perf_counter())
        self.accelerator.print(f"\n[{len(self._begun)} of {self.count}] {text}", flush=True)

    def describe_times(self) -> str:
        """Return how long all took, and each stage."""
        now = time.perf_counter()
        spans = zip(self._begun, [*self._begun[1:], now], strict=True)
        times = ", ".join(write_time(end - begin) for begin, end in spans)
        return f"All took {write_time(now - self._begin)}: {times}."


@dataclass(frozen=True)
class Counts:
    """How many images a run has: to train on (those held out among them), to rank subnets, and to test."""

    training: int
    ranking: int
    testing: int


def estimate_stages(
    args: argparse.Namespace, supernet: Supernet, plan: Sequence[Stage], seconds: float, counts: Counts
) -> float:
    """Return about how many seconds the searches, reconstructions and fine-tunings of a plan take.

    Args:
        args: the flags.
        supernet: of the original.
        plan: the searches.
        seconds: that one image takes in a forward of the original.
        counts: of the images.
    """
    search = estimate_subnets(len(supernet.space)) * counts.ranking / 2
    repair = 4 * min(args.reconstruct, counts.training)
    total: float = seconds * len(plan) * (search + repair + 2 * counts.testing)
    if args.epochs:  # the network is smaller than the original, and the original teaches besides
        device = next(supernet.parameters()).device
        step = time_step(supernet.model, make_images(args, args.batch_size, device)) / args.batch_size
        total += sum(stage.asked for stage in plan) * args.epochs * counts.training * (step + 2 * seconds)
    return total
