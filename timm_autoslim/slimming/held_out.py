"""The held-out images that score subnets, in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.errors import DataError
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.training.outputs import compare_logits, detach
from timm_autoslim.utils.arguments import check_callable, check_module
from timm_autoslim.utils.batches import check_inputs, run_batch
from timm_autoslim.utils.meta import run_model

Subnet = Callable[[Tensor], Tensor]
Evaluate = Callable[[Subnet], float]


class HeldOut:
    """An `evaluate` in parts, so that a search can score a candidate on some of the held-out images first.

    Called like any other `evaluate`, it returns the mean over all parts, each counting the same.

    Args:
        batches: the parts; each should hold several hundred images, for it is normalised by its own statistics.
        score: `score(subnet, batch)`, the loss of a callable subnet on one of them, a float. With `maximize=True`
            in the search it is what is higher for better subnets, such as an accuracy.

    Raises:
        DataError: there are no batches, or they cannot be counted and taken by index.

    Example:
        >>> from torch.nn import functional as F
        >>> batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)]
        >>> evaluate = HeldOut(batches, lambda subnet, batch: F.cross_entropy(subnet(batch[0]), batch[1]).item())
        >>> len(evaluate)
        4
    """

    def __init__(self, batches: Sequence[Any], score: Callable[[Subnet, Any], float]) -> None:
        if not (hasattr(batches, "__len__") and hasattr(batches, "__getitem__")) or isinstance(
            batches, (Mapping, str, bytes)
        ):
            got = f"a {type(batches).__name__} of batches"
            needed = "a sequence, which gives the same batches again and again, such as list(loader)"
            raise DataError.at("HeldOut()", got=got, needed=needed)
        check_callable("HeldOut(score=)", score, DataError, "a callable score(subnet, batch)")
        if not len(batches):
            raise DataError.at("HeldOut()", got="no batches", needed="at least one batch of held-out images")
        self.batches, self.score, self.compares_outputs = batches, score, False

    @classmethod
    def by_outputs(cls, original: nn.Module, inputs: Iterable[Any]) -> HeldOut:
        """Return an `evaluate` that reads no labels: subnets are scored by their distance to a trained model.

        Its score is `soft_cross_entropy` of a subnet's logits and the model's, which are computed once and kept. On the
        models that were measured it found networks as good as the loss on labels did (docs/benchmarks.md).

        Args:
            original: the trained model; it is run in evaluation mode, and not changed.
            inputs: the parts (N, C, H, W), on the model's device; several inputs are a tuple or a dict. Each part is
                normalised by its own statistics, and so should have images of most classes, as a shuffled loader gives
                them.

        Raises:
            DataError: there are none, or the model does not take one.
            ConfigError: `original` is no module; or it returns no logits (N, classes) or (N, classes, H, W): take a
                score of your own.

        Example:
            >>> import timm
            >>> model = timm.create_model("resnet10t", num_classes=10)
            >>> len(HeldOut.by_outputs(model, [torch.randn(8, 3, 32, 32) for _ in range(4)]))
            4
        """
        check_module("original", original)
        replica, parts = replicate(original, Slices({}, {})).eval(), []  # the model itself keeps its mode
        with torch.no_grad():
            for index, batch in enumerate(check_inputs(original, inputs)):
                targets = detach(run_batch(replica, index, batch))
                compare_logits(targets, targets)  # refuses what is none
                parts.append((batch, targets))
        evaluate = cls(parts, lambda subnet, part: compare_logits(run_model(subnet, part[0]), part[1]).item())
        evaluate.compares_outputs = True
        return evaluate

    def __call__(self, subnet: Subnet) -> float:
        """Return the mean over all parts."""
        return math.fsum(float(self.score(subnet, batch)) for batch in self.batches) / len(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
