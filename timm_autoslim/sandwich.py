"""The training step of a supernet: the sandwich rule with in-place distillation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from timm_autoslim.errors import ConfigError

if TYPE_CHECKING:
    from timm_autoslim.space import SearchSpace, Widths

LossFn = Callable[[Tensor, Tensor], Tensor]

# By name, so that torchvision need not be imported and the copies in other code count too.
_DROP_MODULES = frozenset(
    ("DropPath", "DropBlock2d", "DropBlock3d", "PatchDropout", "PatchDropoutWithIndices", "StochasticDepth")
)
_DROP_FUNCTIONS = frozenset(
    (
        *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    )
)


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


def soft_cross_entropy(outputs: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Batch mean of the cross-entropy -sum(p log q) of q = softmax(outputs / T) against p = softmax(teacher / T).

    Computed in float32. Its gradient is that of the Kullback-Leibler divergence KL(p || q). It is scaled by T^2, so
    that the gradient's size depends little on T (Hinton, Vinyals and Dean, arXiv 1503.02531).

    Args:
        outputs: logits (N, classes) of the subnet that learns.
        teacher: logits (N, classes), detached.
        temperature: T, above 0; higher ones soften both distributions.
    """
    soft = (teacher.float() / temperature).softmax(dim=1)
    return F.cross_entropy(outputs.float() / temperature, soft) * temperature**2


def adaptive_alpha_divergence(
    outputs: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    alpha_min: float = -1.0,
    alpha_max: float = 1.0,
    clip: float = 5.0,
) -> Tensor:
    """The larger, image by image, of two alpha-divergences from the teacher to the subnet, averaged over the batch.

    With p = softmax(teacher / T), q = softmax(outputs / T) and the importance weights w_i = (p_i / q_i)^alpha,

        D_alpha(p || q) = sum_i q_i (w_i - 1) / (alpha (alpha - 1)),   d D_alpha = -sum_i q_i w_i / alpha d log q_i,

    where w_i is clipped at `clip` in both, and D_1 is its limit, KL(p || q), which needs no clipping. A negative alpha
    punishes a subnet that is sure where its teacher is not, a positive one a subnet that misses what its teacher finds
    likely. The value is the divergence itself, and the gradient is the formula above: no gradient flows through the
    weights. Computed in float32 and scaled by T^2.

    Source: Wang, Gong, Li, Liu and Chandra, "AlphaNet: Improved Training of Supernets with Alpha-Divergence", arXiv
    2102.07954, and its published code; the defaults are its settings.

    Args:
        outputs: logits (N, classes) of the subnet that learns.
        teacher: logits (N, classes), detached.
        temperature: T, above 0.
        alpha_min, alpha_max: the two alphas, neither 0.
        clip: the largest importance weight.

    Raises:
        ConfigError: an alpha is 0.
    """
    if not alpha_min or not alpha_max:
        raise ConfigError(
            f"adaptive_alpha_divergence() got the alphas {alpha_min} and {alpha_max}; needed: two that are not 0."
        )
    log_q = (outputs.float() / temperature).log_softmax(dim=1)  # (N, classes)
    log_p = (teacher.float() / temperature).log_softmax(dim=1)
    with torch.no_grad():
        first, second = (_divergence(log_p, log_q, alpha, clip) for alpha in (alpha_min, alpha_max))
        left = first[0] > second[0]  # (N,)
        value = torch.where(left, first[0], second[0])
        slope = torch.where(left[:, None], first[1], second[1])  # (N, classes)
    surrogate = (slope * log_q).sum(dim=1)  # (N,): the right gradient
    return (surrogate + (value - surrogate.detach())).mean() * temperature**2


def _divergence(log_p: Tensor, log_q: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """Value (N,) of one alpha-divergence, and its derivative (N, classes) by log q."""
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    if alpha == 1:
        return (p * log_ratio).sum(dim=1), -p
    weights = (alpha * log_ratio).exp().clamp(max=clip)  # an overflow is clipped too
    return (q * (weights - 1)).sum(dim=1) / (alpha * (alpha - 1)), -q * weights / alpha


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch dropout and drop path off for the length of a block, while BatchNorm keeps its batch statistics.

    Covers modules (torch's dropouts; timm's and torchvision's drop path, drop block and patch dropout) and the
    functions of `torch.nn.functional` that a forward calls itself, attention's dropout among them.
    """
    paused = [module for module in model.modules() if module.training and _drops(module)]
    try:
        for module in paused:
            module.training = False  # not eval(), which would reach what such a module may hold
        with _NoDropout():
            yield
    finally:
        for module in paused:
            module.training = True


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return True
    return any(kind.__name__ in _DROP_MODULES for kind in type(module).__mro__)


class _NoDropout(TorchFunctionMode):
    """Makes dropout functions do nothing; many models call these, and no module tells of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROP_FUNCTIONS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        elif func is F.multi_head_attention_forward:
            kwargs["training"] = False
        return func(*args, **kwargs)


def resized(images: Tensor, side: int) -> Tensor:
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
                around.enter_context(without_dropout(model))
            images = resized(inputs, sizes[drawn[index]]) if sizes and index else inputs
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
