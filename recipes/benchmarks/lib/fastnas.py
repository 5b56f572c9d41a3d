"""FastNAS of NVIDIA ModelOpt, a peer that needs `nvidia-modelopt` and `torchprofile<0.1`."""

from __future__ import annotations

import copy
import importlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_autoslim.recipes.benchmarks.lib.slim_networks import Network, Task, score

DIVISOR = 8  # of the widths; ModelOpt's default, 32, is a quarter of the narrowest width of the small ConvNeXt


def search_fastnas(task: Task) -> Iterator[Network]:
    """Measure the loss of every width alone, once; then one threshold of it for all widths meets each share.

    Raises:
        Exception: ModelOpt's, where it finds no width to choose.
    """
    prune = importlib.import_module("modelopt.torch.prune")

    def rate(model: nn.Module) -> float:
        with torch.no_grad():
            return -statistics.fmean(score(model, batch) for batch in task.held_out)

    with tempfile.TemporaryDirectory() as folder:
        options = {"score_func": rate, "checkpoint": Path(folder, "losses").as_posix()}  # read again for the next share
        for share in task.shares:
            model, _ = prune.prune(
                copy.deepcopy(task.model), [("fastnas", _make_config())], {"flops": f"{100 * share}%"},
                task.batches[0][:1], options,
            )  # fmt: skip
            yield Network(model, None)


def _make_config() -> dict[str, Any]:
    config: dict[str, Any] = importlib.import_module("modelopt.torch.prune.fastnas").FastNASConfig().model_dump()
    for rules in config.values():
        for rule in rules.values():
            rule.update({name: DIVISOR for name in rule if name.endswith("divisor")})
    return config
