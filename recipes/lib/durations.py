"""How long stages take: measured, estimated and written."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn

from timm_autoslim import Stage, Supernet, estimate_subnets
from timm_autoslim.recipes.lib.models import make_images
from timm_autoslim.recipes.lib.run_folder import write_json


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
    """Says which stage of how many begins, and how long each took: in this call, and in those that it goes on from.

    As a context it writes the times to their file when the block ends, in whatever way, unless no stage has begun. A
    call that is killed by SIGKILL leaves the times of the stages that it had ended.

    Attributes:
        path: of the file, in the run folder.
        count: how many there are; to be set before the first one.
    """

    def __init__(self, accelerator: Accelerator, path: Path) -> None:
        self.accelerator, self.path, self.count = accelerator, path, 0
        self._calls, self._seconds = _read_times(path)
        self._calls += 1
        self._names: list[str] = []  # of the stages of this call, the last of which runs
        self._since = time.perf_counter()

    def announce(self, name: str, text: str) -> None:
        """Say that the next stage begins.

        Args:
            name: by which it is known again when the command is given again.
            text: what it does.
        """
        if self._names:  # what came before the first one belongs to it
            self._count_time()
        self._names.append(name)
        self.accelerator.print(f"\n[{len(self._names)} of {self.count}] {text}", flush=True)

    def describe_times(self) -> str:
        """Return how long all took, and each stage."""
        self._count_time()
        times = [self._seconds[name] for name in self._names]
        calls = f" in {self._calls} calls" if self._calls > 1 else ""
        return f"All took {write_time(sum(times))}{calls}: {', '.join(map(write_time, times))}."

    def _count_time(self) -> None:
        """Add what went by to the stage that runs, and write all times."""
        now, name = time.perf_counter(), self._names[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
        if self.accelerator.is_main_process:
            write_json(self.path, {"calls": self._calls, "seconds": self._seconds})

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        if self._names:
            self._count_time()


def _read_times(path: Path) -> tuple[int, dict[str, float]]:
    """Return the number of calls, and the seconds of each stage; none of a file that lacks or is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return int(content["calls"]), {str(name): float(number) for name, number in content["seconds"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0, {}


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
