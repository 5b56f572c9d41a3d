"""A training that diverges stops: its losses and weights are checked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from timm_autoslim.errors import AutoSlimError

Describe = Callable[[str, int, int], str]


class NotFiniteError(AutoSlimError, FloatingPointError):
    """A loss or a weight has turned infinite or NaN: the training has diverged."""


def check_losses(recent: Sequence[tuple[int, Mapping[str, Tensor]]], epoch: str, describe: Describe | None) -> None:
    """Stop at the first loss that is not finite.

    Args:
        recent: steps, each with its losses by name.
        epoch: which epoch they are of, for the error.
        describe: `describe(name, index, step)` says what had that loss, for the error.

    Raises:
        NotFiniteError: with the step, the value and what had it.
    """
    flat = [loss.flatten() for _, losses in recent for loss in losses.values()]
    if not flat or torch.cat(flat).isfinite().all():
        return
    for step, losses in recent:
        for name, loss in losses.items():
            for index, value in enumerate(loss.flatten().tolist()):
                if not math.isfinite(value):
                    what = f" of {describe(name, index, step)}" if describe else ""
                    raise NotFiniteError(f"The loss is not finite at step {step} ({epoch}): {name} is {value}{what}.")


def check_weights(model: nn.Module, when: str) -> None:
    """Stop if a weight is not finite: the last step may have ruined it after its loss was computed.

    Raises:
        NotFiniteError: with the first such weight.
    """
    statistics = (
        (name, buffer) for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    )
    for name, value in itertools.chain(model.named_parameters(), statistics):
        if not value.isfinite().all():
            raise NotFiniteError(f"The weights are not finite {when}, though the losses were: see {name}.")
