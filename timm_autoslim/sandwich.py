"""The training step of a supernet: the sandwich rule with in-place distillation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim.errors import ConfigError

if TYPE_CHECKING:
    from timm_autoslim.space import SearchSpace, Widths

LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SandwichStep:
    """What one step did; every tensor is detached.

    Attributes:
        widths: the subnets in the order that they ran: widest, narrowest, random ones.
        losses: one scalar for each; the first is the hard-label loss, the others are distillation losses.
        outputs: the widest subnet's output (N, classes), from which a training accuracy comes for free.
    """

    widths: tuple[Widths, ...]
    losses: tuple[Tensor, ...]
    outputs: Tensor

    @property
    def loss(self) -> Tensor:
        """The sum of the losses: what the step descended on."""
        return torch.stack(self.losses).sum()


def soft_cross_entropy(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy -sum(p log q), averaged over the batch, of q = softmax(outputs) against p = softmax(teacher).

    Temperature 1, computed in float32. Its gradient is that of the Kullback-Leibler divergence KL(p || q).

    Args:
        outputs: logits (N, classes) of the subnet that learns.
        teacher: logits (N, classes), detached.
    """
    return F.cross_entropy(outputs.float(), teacher.float().softmax(dim=1))


def sandwich_step(
    model: nn.Module,
    space: SearchSpace,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    generator: torch.Generator,
    n: int = 4,
    sample: Callable[[torch.Generator], Widths] | None = None,
    distill: LossFn = soft_cross_entropy,
    backward: Callable[[Tensor], object] = Tensor.backward,
    no_sync: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> SandwichStep:
    """Add the gradients of the widest, the narrowest and n - 2 random subnets; the caller zeroes, clips and steps.

    The widest learns from the targets; all others learn only from its detached output. The losses are summed unscaled,
    with one backward for each subnet, so that one subnet's activations are held at a time. Source: Yu and Huang,
    "Universally Slimmable Networks", arXiv 1903.05134 ("The Sandwich Rule", "Inplace Distillation"), used by them in
    "AutoSlim", arXiv 1903.11728, with random widths group by group.

    Args:
        model: the supernet, or what wraps it (DistributedDataParallel): called as `model(inputs, widths)`.
        space: the supernet's search space.
        inputs: (N, C, H, W).
        targets: whatever `loss_fn` takes: class indices (N,), or probabilities (N, classes).
        loss_fn: `loss_fn(outputs, targets)`, a scalar; for the widest alone.
        generator: draws the random widths. With several processes seed it equally in each, by (seed, step).
        n: how many subnets in all.
        sample: draws one random subnet; `space.sample` if None.
        distill: `distill(outputs, teacher)`, a scalar; for all but the widest.
        backward: takes one loss; `accelerator.backward`, for instance.
        no_sync: makes the context in which gradients stay local: `lambda: accelerator.no_sync(model)`. All but the last
            subnet run in it, forward and backward.

    Raises:
        ConfigError: `n` is below 2.
    """
    if n < 2:
        raise ConfigError(f"sandwich_step() got n={n}, but the sandwich needs the widest and the narrowest: n >= 2.")
    sample = sample or space.sample
    subnets = (space.max(), space.min(), *(sample(generator) for _ in range(n - 2)))
    losses = []
    teacher: Tensor | None = None  # (N, classes)
    for index, widths in enumerate(subnets):
        last = index == n - 1
        with contextlib.nullcontext() if last else no_sync():
            outputs = model(inputs, widths)  # (N, classes)
            if teacher is None:
                loss = loss_fn(outputs, targets)
                teacher = outputs.detach()
            else:
                loss = distill(outputs, teacher)
            backward(loss)
        losses.append(loss.detach())
    assert teacher is not None
    return SandwichStep(subnets, tuple(losses), teacher)
