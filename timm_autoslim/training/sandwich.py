"""The training step of a supernet: the sandwich rule with in-place distillation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim.errors import ConfigError

if TYPE_CHECKING:
    from timm_autoslim.supernet.space import SearchSpace, Widths
from timm_autoslim.training.distillation import LossFn, soft_cross_entropy
from timm_autoslim.training.dropout import disable_dropout


@dataclass(frozen=True)
class SandwichStep:
    """What one step did; every tensor is detached.

    Attributes:
        widths: the subnets in the order that they ran: widest, narrowest, random ones; or the widest alone.
        losses: one scalar for each; the first is the widest's loss on the targets (mixed with that on the teacher, if
            it learns from one), the others are distillation losses.
        outputs: the widest subnet's output (N, classes), from which a training accuracy comes for free.
    """

    widths: tuple[Widths, ...]
    losses: tuple[Tensor, ...]
    outputs: Tensor

    @property
    def loss(self) -> Tensor:
        """The sum of the losses: what the step descended on."""
        return torch.stack(self.losses).sum()


def resize_images(images: Tensor, side: int) -> Tensor:
    """Resize images (N, C, H, W) to (N, C, side, side), bilinearly and without aliasing."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


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
    teacher: Callable[[Tensor], Tensor] | None = None,
    teach_widest: float = 0.0,
    only_widest: bool = False,
    regularize_widest_only: bool = False,
    sizes: Sequence[int] = (),
    backward: Callable[[Tensor], object] = Tensor.backward,
    no_sync: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> SandwichStep:
    """Add the gradients of the widest, the narrowest and n - 2 random subnets; the caller zeroes, clips and steps.

    The widest learns from the targets; all others learn only from its detached output, or from a teacher's. The losses
    are summed unscaled, with one backward for each subnet, so that one subnet's activations are held at a time. Source:
    Yu and Huang, "Universally Slimmable Networks", arXiv 1903.05134 ("The Sandwich Rule", "Inplace Distillation"), used
    by them in "AutoSlim", arXiv 1903.11728, with random widths group by group.

    Args:
        model: the supernet, or what wraps it (DistributedDataParallel): called as `model(inputs, widths)`.
        space: the supernet's search space.
        inputs: (N, C, H, W).
        targets: whatever `loss_fn` takes: class indices (N,), or probabilities (N, classes).
        loss_fn: `loss_fn(outputs, targets)`, a scalar; for the widest alone.
        generator: draws the random widths. With several processes seed it equally in each, by (seed, step).
        n: how many subnets in all.
        sample: draws one random subnet; `space.sample` if None.
        distill: `distill(outputs, teacher)` of two logits (N, classes), a scalar; for all but the widest.
            `soft_cross_entropy`, `adaptive_alpha_divergence`, or a function of your own.
        teacher: gives the logits (N, classes) of `inputs` that the others learn from; called once a step, without
            gradient. If None, the widest's own output. Such as a frozen model in eval mode, or a moving average of the
            widest (Li et al., "Dynamic Slimmable Network", arXiv 2103.13258).
        teach_widest: share of the teacher's loss in that of the widest, 0 to 1; the rest is `loss_fn`'s.
        only_widest: train the widest alone, as in the first part of a training with delayed shrinking (Annavajjala et
            al., arXiv 2407.06167).
        regularize_widest_only: all but the widest run without dropout and drop path (Yu et al., "BigNAS", arXiv
            2003.11142).
        sizes: sides, in pixels, of the images (N, C, side, side) for all but the widest, one drawn for each subnet; the
            widest and a teacher see the images as they are. Empty: all do (Yang et al., "MutualNet", arXiv
            1909.12978).
        backward: takes one loss; `accelerator.backward`, for instance.
        no_sync: makes the context in which gradients stay local: `lambda: accelerator.no_sync(model)`. All but the last
            subnet run in it, forward and backward.

    Raises:
        ConfigError: `n` is below 2, `teach_widest` is out of range or has no teacher, or the teacher's logits are of
            another shape than the widest's.
    """
    if n < 2:
        raise ConfigError(f"sandwich_step() got n={n}, but the sandwich needs the widest and the narrowest: n >= 2.")
    if not 0 <= teach_widest <= 1 or (teach_widest and teacher is None):
        raise ConfigError(
            f"sandwich_step() got teach_widest={teach_widest}; needed: a share from 0 to 1, and a teacher= if above 0."
        )
    sample = sample or space.sample
    subnets = (space.max(),) if only_widest else (space.max(), space.min(), *(sample(generator) for _ in range(n - 2)))
    drawn = (
        torch.randint(len(sizes), (len(subnets),), generator=generator).tolist() if sizes else []
    )  # after the widths
    soft: Tensor | None = None  # (N, classes), the logits that are learnt from
    if teacher is not None and (teach_widest or not only_widest):
        with torch.no_grad():
            soft = teacher(inputs).detach()
    losses = []
    widest: Tensor | None = None  # (N, classes)
    for index, widths in enumerate(subnets):
        with contextlib.ExitStack() as around:
            if index < len(subnets) - 1:
                around.enter_context(no_sync())
            if regularize_widest_only and index:
                around.enter_context(disable_dropout(model))
            images = resize_images(inputs, sizes[drawn[index]]) if sizes and index else inputs
            outputs = model(images, widths)  # (N, classes)
            if widest is None:
                widest = outputs.detach()
                if soft is not None and soft.shape != widest.shape:
                    raise ConfigError(
                        f"sandwich_step() got a teacher with outputs {tuple(soft.shape)}, but the model has "
                        f"{tuple(widest.shape)}: take a teacher of the same classes."
                    )
                loss = loss_fn(outputs, targets)
                if teach_widest and soft is not None:
                    loss = (1 - teach_widest) * loss + teach_widest * distill(outputs, soft)
            else:
                loss = distill(outputs, widest if soft is None else soft)
            backward(loss)
        losses.append(loss.detach())
    assert widest is not None
    return SandwichStep(subnets, tuple(losses), widest)
