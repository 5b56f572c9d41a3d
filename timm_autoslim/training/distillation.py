"""Distillation losses: what a subnet learns from its teacher's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_autoslim.errors import ConfigError

if TYPE_CHECKING:
    pass


LossFn = Callable[[Tensor, Tensor], Tensor]


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
