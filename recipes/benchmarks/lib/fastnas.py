"""FastNAS of NVIDIA ModelOpt, a peer that needs `nvidia-modelopt` and `torchprofile<0.1`."""

from __future__ import annotations

import copy
import importlib
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_autoslim.recipes.benchmarks.lib.slim_networks import Network, Task, count_macs, score

DIVISOR = 8  # of the widths; ModelOpt's default, 32, is a quarter of the narrowest width of the small ConvNeXt


def search_fastnas(task: Task) -> Iterator[Network]:
    """Measure the loss of every width alone, once; then one threshold of it for all widths meets each share.

    Raises:
        Exception: ModelOpt's, where it finds no width to choose.
    """
    prune, image, unseen = importlib.import_module("modelopt.torch.prune"), task.batches[0][:1], 0

    def rate(model: nn.Module) -> float:
        nonlocal unseen
        unseen += count_macs(model, image) * sum(len(images) for images, _ in task.held_out)
        with torch.no_grad():
            return -statistics.fmean(score(model, batch) for batch in task.held_out)

    # A thread of its own, since ModelOpt counts by a trace, in which a counter around it would change the operators.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:
        options = {"score_func": rate, "checkpoint": Path(folder, "losses").as_posix()}  # read again for the next share
        for share in task.shares:
            budget: Any = {"flops": f"{100 * share}%"}
            model = copy.deepcopy(task.model)
            thread.submit(prune.prune, model, [("fastnas", _make_config())], budget, image, options).result()
            yield Network(model, None, unseen)
            unseen = 0


def _make_config() -> dict[str, Any]:
    config: dict[str, Any] = importlib.import_module("modelopt.torch.prune.fastnas").FastNASConfig().model_dump()
    for rules in config.values():
        for rule in rules.values():
            rule.update({name: DIVISOR for name in rule if name.endswith("divisor")})
    return config
