"""The training step of a supernet: the sandwich rule with in-place distillation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim.errors import ConfigError
from timm_autoslim.supernet.space import SearchSpace
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.training.distillation import DistillFn, soft_cross_entropy
from timm_autoslim.training.dropout import disable_dropout
from timm_autoslim.training.outputs import compare, detach, find_read, separate
from timm_autoslim.utils.arguments import (
    as_integer,
    check_callable,
    check_flag,
    check_integer,
    check_share,
    check_type,
    quote,
)
from timm_autoslim.utils.meta import run_model
from timm_autoslim.utils.tensors import collect_tensors, map_tensors


@dataclass(frozen=True)
class SandwichStep:
    """The subnets and losses of one step; every tensor is detached.

    Attributes:
        widths: the subnets in the order in which they ran: widest, narrowest, random ones; or the widest alone.
        losses: one scalar for each; the first is the widest's loss on the targets (mixed with that on the teacher, if
            it learns from one), the others are distillation losses.
        outputs: what the widest subnet returned, such as logits (N, classes), for example for a training accuracy.

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
    outputs: Any = field(repr=False)

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
    inputs: Any,
    targets: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    generator: torch.Generator,
    n: int = 4,
    sample: Callable[[torch.Generator], Widths] | None = None,
    distill: DistillFn = soft_cross_entropy,
    teacher: Callable[..., Any] | None = None,
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
        model: the supernet, or a wrapper of it (DistributedDataParallel): called as `model(inputs, widths)`, or with
            several inputs and `widths=`.
        space: the supernet's search space.
        inputs: images (N, C, H, W); several inputs as a tuple or, by name, as a dict, as `convert` takes them.
        targets: whatever `loss_fn` takes: class indices (N,), or probabilities (N, classes).
        loss_fn: `loss_fn(outputs, targets)`, a scalar; for the widest alone.
        generator: draws the random widths. With several processes seed it equally in each, by (seed, step).
        n: how many subnets in all.
        sample: draws the widths of one random subnet; `space.sample` if None.
        distill: `distill(outputs, teacher)` of two logits (N, classes), a scalar; for all but the widest.
            `soft_cross_entropy` or `adaptive_alpha_divergence`: of several outputs they take the mean over those that
            `loss_fn` reads. Or a function of your own, which gets what the model returns; features whose width shrinks
            need one.
        teacher: returns the logits (N, classes) of the inputs that the others learn from; called once a step, without
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
            the teacher's logits are of another shape than the widest's, `distill` compares logits and the outputs are
            none, or a loss is not one number.

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
    _check_inputs(model, inputs, sizes)
    teaching: Any = None  # such as logits (N, classes)
    if teacher is not None and (teach_widest or not only_widest):
        with torch.no_grad():
            teaching = detach(run_model(teacher, inputs))
    losses = []
    widest: Any = None  # such as logits (N, classes)
    read: tuple[int, ...] = ()  # which tensors of the outputs the loss reads
    for index, widths in enumerate(subnets):
        last, drop = index == len(subnets) - 1, not index or not regularize_widest_only
        with (
            contextlib.nullcontext() if last else no_sync(),
            contextlib.nullcontext() if drop else disable_dropout(model),
        ):
            outputs = _run(model, _resize(inputs, sizes[draws[index]]) if sizes and index else inputs, widths)
            if not index:
                outputs, widest = separate(outputs), detach(outputs)
                _check_teacher(teaching, widest)
                loss = _check_loss("loss_fn", loss_fn(outputs, targets))
                read = find_read(loss, outputs) if len(subnets) > 1 or teaching is not None else ()
                if teach_widest and teaching is not None:
                    loss = (1 - teach_widest) * loss + teach_widest * compare(distill, outputs, teaching, read)
            else:
                loss = compare(distill, outputs, widest if teaching is None else teaching, read)
            backward(_check_loss("distill", loss))
        losses.append(loss.detach())
    return SandwichStep(subnets, tuple(losses), widest)


def _run(model: nn.Module, inputs: Any, widths: Widths) -> Any:
    """Return what a subnet returns for inputs as `convert` takes them."""
    if isinstance(inputs, Mapping):
        return model(**inputs, widths=widths)
    return model(*inputs, widths=widths) if isinstance(inputs, tuple) else model(inputs, widths)


def _resize(inputs: Any, side: int) -> Any:
    """Return inputs, of which one is images, with images of another size."""
    return map_tensors(lambda images: resize_images(images, side), inputs)


def _check_inputs(model: object, inputs: Any, sizes: Sequence[int]) -> None:
    """Raise ConfigError for inputs of another structure than `convert` got, or of several images that have sizes."""
    supernet = getattr(model, "module", model)
    if isinstance(inputs, list) and isinstance(supernet, Supernet):
        example = supernet.example()
        if isinstance(example, Mapping) or (isinstance(example, tuple) and len(example) == len(inputs) > 1):
            kind = "dict" if isinstance(example, Mapping) else "tuple"
            needed = f"a {kind} of inputs, as convert got it: a list is one input"
            raise ConfigError.at("inputs", got="a list", needed=needed, remedy="convert it, such as tuple(inputs)")
    tensors = collect_tensors(inputs)
    if sizes and (len(tensors) != 1 or tensors[0].dim() != 4):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        remedy = "leave sizes out, and resize the inputs of a step yourself"
        raise ConfigError.at("sizes", got=f"inputs of the shapes {shapes}", needed="images (N, C, H, W)", remedy=remedy)


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


def _check_loss(name: str, loss: Any) -> Tensor:
    """Return what a loss function of this name returned, or raise ConfigError if it is not one number in a tensor."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    got = f"a tensor of the shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    needed, remedy = "one number for all images, in a tensor", 'leave out reduction="none", or return its .mean()'
    raise ConfigError.at(name, got=got, needed=needed, remedy=remedy)


def _check_teacher(teaching: Any, outputs: Any) -> None:
    """Raise ConfigError if the teacher's logits are of another shape than the model's outputs."""
    if isinstance(teaching, Tensor) and isinstance(outputs, Tensor) and teaching.shape != outputs.shape:
        raise ConfigError.at(
            "teacher",
            got=f"logits of the shape {tuple(teaching.shape)}",
            needed=f"the shape of the model's outputs, {tuple(outputs.shape)}",
            remedy="use a teacher of the same classes",
        )
