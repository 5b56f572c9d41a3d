"""The training step of a supernet: the sandwich rule with in-place distillation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim.errors import ConfigError
from timm_autoslim.supernet.space import SearchSpace
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.training.distillation import LossFn, soft_cross_entropy
from timm_autoslim.training.dropout import disable_dropout
from timm_autoslim.utils.arguments import (
    as_integer,
    check_callable,
    check_flag,
    check_integer,
    check_share,
    check_type,
    quote,
)


@dataclass(frozen=True)
class SandwichStep:
    """The subnets and losses of one step; every tensor is detached.

    Attributes:
        widths: the subnets in the order in which they ran: widest, narrowest, random ones; or the widest alone.
        losses: one scalar for each; the first is the widest's loss on the targets (mixed with that on the teacher, if
            it learns from one), the others are distillation losses.
        outputs: the widest subnet's output (N, classes), for example for a training accuracy.

    Example:
        >>> import timm, torch
        >>> from torch.nn.functional import cross_entropy
        >>> from timm_autoslim import convert, sandwich_step
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)).train()
        >>> images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
        >>> step = sandwich_step(
        ...     supernet, supernet.space, images, labels, cross_entropy, generator=torch.Generator().manual_seed(0)
        ... )
        >>> step.widths[0] == supernet.space.max(), step.widths[1] == supernet.space.min(), len(step.widths)
        (True, True, 4)
        >>> torch.equal(step.loss, sum(step.losses))
        True
        >>> step.outputs.shape
        torch.Size([8, 10])
    """

    widths: tuple[Widths, ...]
    losses: tuple[Tensor, ...]
    outputs: Tensor

    @property
    def loss(self) -> Tensor:
        """The sum of the losses, which the step's gradient is of."""
        return torch.stack(self.losses).sum()


def resize_images(images: Tensor, side: int) -> Tensor:
    """Return images (N, C, H, W) as (N, C, side, side), resized bilinearly and without aliasing."""
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

    The widest learns from the targets. All others learn only from its detached output, or from a teacher's. The losses
    are summed unscaled. Each subnet has a backward of its own, so that the activations of one subnet at a time are in
    memory. Source: Yu and Huang, "Universally Slimmable Networks", arXiv 1903.05134 ("The Sandwich Rule", "Inplace
    Distillation"); "AutoSlim", arXiv 1903.11728, trains so with random widths group by group.

    Args:
        model: the supernet, or a wrapper of it (DistributedDataParallel): called as `model(inputs, widths)`.
        space: the supernet's search space.
        inputs: (N, C, H, W).
        targets: whatever `loss_fn` takes: class indices (N,), or probabilities (N, classes).
        loss_fn: `loss_fn(outputs, targets)`, a scalar; for the widest alone.
        generator: draws the random widths. With several processes seed it equally in each, by (seed, step).
        n: how many subnets in all.
        sample: draws the widths of one random subnet; `space.sample` if None.
        distill: `distill(outputs, teacher)` of two logits (N, classes), a scalar; for all but the widest.
            `soft_cross_entropy`, `adaptive_alpha_divergence`, or a function of your own.
        teacher: returns the logits (N, classes) of `inputs` that the others learn from; called once a step, without
            gradient. If None, the widest's own output is used. A teacher is a frozen model in eval mode, for example,
            or a moving average of the widest (Li et al., "Dynamic Slimmable Network", arXiv 2103.13258).
        teach_widest: share of the teacher's loss in that of the widest, 0 to 1; the rest is `loss_fn`'s.
        only_widest: train the widest alone, as in the first part of a training with delayed shrinking (Annavajjala et
            al., arXiv 2407.06167).
        regularize_widest_only: run all but the widest without dropout and drop path (Yu et al., "BigNAS", arXiv
            2003.11142).
        sizes: sides, in pixels, of the images (N, C, side, side) for all but the widest, one drawn for each subnet
            (Yang et al., "MutualNet", arXiv 1909.12978). The widest and the teacher get the images as they are, and so
            do all if it is empty.
        backward: takes one loss; `accelerator.backward`, for example.
        no_sync: returns the context in which gradients are not synchronised: `lambda: accelerator.no_sync(model)`. All
            but the last subnet run in it, forward and backward.

    Raises:
        ConfigError: an argument is of the wrong type, `n` is below 2, `teach_widest` is out of range or has no teacher,
            or the teacher's logits are of another shape than the widest's.

    Example:
        >>> import timm, torch
        >>> from torch.nn.functional import cross_entropy
        >>> from timm_autoslim import convert, sandwich_step
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)).train()
        >>> optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
        >>> images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
        >>> generator = torch.Generator().manual_seed(0)
        >>> step = sandwich_step(supernet, supernet.space, images, labels, cross_entropy, generator=generator)
        >>> optimizer.step()
        >>> len(step.losses)
        4
    """
    check_type("space", space, SearchSpace, ConfigError, "the supernet's search space, supernet.space")
    _check_callables(model, loss_fn, sample, distill, teacher, backward, no_sync)
    _check_numbers(n, teacher, teach_widest, sizes)
    check_type("generator", generator, torch.Generator | None, ConfigError, "a torch.Generator")  # type: ignore[arg-type]
    check_flag("only_widest", only_widest)
    check_flag("regularize_widest_only", regularize_widest_only)
    draw = sample or space.sample
    subnets = (space.max(),) if only_widest else (space.max(), space.min(), *(draw(generator) for _ in range(n - 2)))
    # after the widths, so that these are the same with and without sizes
    draws = torch.randint(len(sizes), (len(subnets),), generator=generator).tolist() if sizes else []
    teacher_logits: Tensor | None = None  # (N, classes)
    if teacher is not None and (teach_widest or not only_widest):
        with torch.no_grad():
            teacher_logits = teacher(inputs).detach()
    losses = []
    widest: Tensor | None = None  # (N, classes)
    for index, widths in enumerate(subnets):
        last, drop = index == len(subnets) - 1, not index or not regularize_widest_only
        with (
            contextlib.nullcontext() if last else no_sync(),
            contextlib.nullcontext() if drop else disable_dropout(model),
        ):
            images = resize_images(inputs, sizes[draws[index]]) if sizes and index else inputs
            outputs = model(images, widths)  # (N, classes)
            if widest is None:
                widest = outputs.detach()
                _check_teacher(teacher_logits, widest)
                loss = loss_fn(outputs, targets)
                if teach_widest and teacher_logits is not None:
                    loss = (1 - teach_widest) * loss + teach_widest * distill(outputs, teacher_logits)
            else:
                loss = distill(outputs, widest if teacher_logits is None else teacher_logits)
            backward(loss)
        losses.append(loss.detach())
    assert widest is not None
    return SandwichStep(subnets, tuple(losses), widest)


def _check_callables(
    model: object, loss_fn: object, sample: object, distill: object, teacher: object, backward: object, no_sync: object
) -> None:
    """Raise ConfigError if an argument of a step cannot be called."""
    check_callable("model", model, ConfigError, "the supernet, or a wrapper of it, called as model(inputs, widths)")
    check_callable("loss_fn", loss_fn, ConfigError, "a callable loss_fn(outputs, targets)")
    if sample is not None:
        check_callable("sample", sample, ConfigError, "a callable sample(generator), or None")
    check_callable("distill", distill, ConfigError, "a callable distill(outputs, teacher)")
    if teacher is not None:
        check_callable("teacher", teacher, ConfigError, "a callable teacher(inputs), or None")
    check_callable("backward", backward, ConfigError, "a callable backward(loss)")
    check_callable("no_sync", no_sync, ConfigError, "a callable no_sync() that returns a context")


def _check_numbers(n: int, teacher: object, teach_widest: float, sizes: Sequence[int]) -> None:
    """Raise ConfigError if the numbers of a step are out of range."""
    number = as_integer(n)
    if number is None or number < 2:
        raise ConfigError.at(
            "n", got=repr(n), needed="an integer of at least 2, for the widest and the narrowest subnet"
        )
    needed = "a share from 0 to 1, and a teacher= if it is above 0"
    if check_share("teach_widest", teach_widest, ConfigError, needed) and teacher is None:
        raise ConfigError.at("teach_widest", got=repr(teach_widest), needed=needed)
    if not isinstance(sizes, Sequence) or isinstance(sizes, (str, bytes)):
        raise ConfigError.at("sizes", got=quote(sizes), needed="a list of sides in pixels; () for none")
    for side in sizes:
        check_integer("sizes", side, ConfigError)


def _check_teacher(logits: Tensor | None, outputs: Tensor) -> None:
    """Raise ConfigError if the teacher's logits are of another shape than the model's outputs."""
    if logits is not None and logits.shape != outputs.shape:
        raise ConfigError.at(
            "teacher",
            got=f"logits of the shape {tuple(logits.shape)}",
            needed=f"the shape of the model's outputs, {tuple(outputs.shape)}",
            remedy="use a teacher of the same classes",
        )
