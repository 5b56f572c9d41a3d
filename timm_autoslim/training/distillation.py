"""Distillation losses: how far a subnet's logits are from its teacher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_autoslim.errors import ConfigError
from timm_autoslim.utils.arguments import check_positive, check_type, is_number, quote
from timm_autoslim.utils.tables import Table

DistillFn = Callable[[Any, Any], Tensor]  # of outputs and teacher, of any structure

_LOGITS = "a tensor of logits (N, classes), picked from what the model returns"

DISTILLATION_LOSSES: Table[Callable[..., Tensor]] = Table("distillation loss")
"""Distillation losses by name: `loss(outputs, teacher, temperature=T)` of two logits (N, classes), a scalar.

- "kl": `soft_cross_entropy`.
- "alpha": `adaptive_alpha_divergence`.
"""


@DISTILLATION_LOSSES.add("kl")
def soft_cross_entropy(outputs: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the cross-entropy -sum(p log q) of q = softmax(outputs / T) against p = softmax(teacher / T).

    The mean over the batch, computed in float32. Its gradient is that of the Kullback-Leibler divergence KL(p || q). It
    is scaled by T^2, so that the size of the gradient depends little on T (Hinton, Vinyals and Dean, "Distilling the
    Knowledge in a Neural Network", arXiv 1503.02531).

    Args:
        outputs: logits (N, classes) of the subnet that learns.
        teacher: logits (N, classes), detached.
        temperature: T, above 0; the higher, the softer both distributions.

    Raises:
        ConfigError: an argument is of the wrong type or out of range.

    Example:
        >>> import torch
        >>> from timm_autoslim import soft_cross_entropy
        >>> outputs = torch.tensor([[2.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 0.0]])  # has no preference, so that its entropy is log(2) = 0.693
        >>> round(soft_cross_entropy(outputs, teacher).item(), 3)
        1.127
        >>> round(soft_cross_entropy(teacher, teacher).item(), 3)
        0.693
    """
    _check_arguments(outputs, teacher, temperature)
    soft = (teacher.float() / temperature).softmax(dim=1)
    return F.cross_entropy(outputs.float() / temperature, soft) * temperature**2


@DISTILLATION_LOSSES.add("alpha")
def adaptive_alpha_divergence(
    outputs: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    alpha_min: float = -1.0,
    alpha_max: float = 1.0,
    clip: float = 5.0,
) -> Tensor:
    """Return the larger of two alpha-divergences from the teacher to the subnet, chosen for each image.

    With p = softmax(teacher / T), q = softmax(outputs / T) and the importance weights w_i = (p_i / q_i)^alpha,

        D_alpha(p || q) = sum_i q_i (w_i - 1) / (alpha (alpha - 1)),   d D_alpha = -sum_i q_i w_i / alpha d log q_i,

    where w_i is clipped at `clip` in both formulas, and D_1 is the limit, KL(p || q), which needs no clipping. A
    negative alpha punishes a subnet that is sure where its teacher is not. A positive one punishes a subnet that misses
    what its teacher finds likely. The value is the divergence, and the gradient is the formula above: no gradient flows
    through the weights. The mean over the batch, computed in float32 and scaled by T^2.

    Source: Wang, Gong, Li, Liu and Chandra, "AlphaNet: Improved Training of Supernets with Alpha-Divergence", arXiv
    2102.07954, and its published code; the defaults are its settings.

    Args:
        outputs: logits (N, classes) of the subnet that learns.
        teacher: logits (N, classes), detached.
        temperature: T, above 0.
        alpha_min: the smaller alpha, not 0.
        alpha_max: the larger alpha, not 0.
        clip: the largest importance weight.

    Raises:
        ConfigError: an alpha is 0, or an argument is of the wrong type or out of range.

    Example:
        >>> import torch
        >>> from timm_autoslim import adaptive_alpha_divergence
        >>> teacher = torch.tensor([[3.0, 0.0, 0.0]])
        >>> outputs = torch.tensor([[0.0, 3.0, 0.0]], requires_grad=True)
        >>> loss = adaptive_alpha_divergence(outputs, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 2)
        2.59
        >>> adaptive_alpha_divergence(teacher, teacher).abs().item() < 1e-6
        True
    """
    _check_arguments(outputs, teacher, temperature)
    for name, alpha in (("alpha_min", alpha_min), ("alpha_max", alpha_max)):
        if not is_number(alpha) or not alpha:
            raise ConfigError.at(name, got=quote(alpha), needed="a number that is not 0")
    if not is_number(clip) or not clip > 0:
        raise ConfigError.at("clip", got=quote(clip), needed="a number above 0; math.inf for none")
    log_q = (outputs.float() / temperature).log_softmax(dim=1)  # (N, classes)
    log_p = (teacher.float() / temperature).log_softmax(dim=1)
    with torch.no_grad():
        first, second = (_divergence(log_p, log_q, alpha, clip) for alpha in (alpha_min, alpha_max))
        larger = first[0] > second[0]  # (N,)
        value = torch.where(larger, first[0], second[0])
        slope = torch.where(larger[:, None], first[1], second[1])  # (N, classes)
    surrogate = (slope * log_q).sum(dim=1)  # (N,): its gradient is the formula's, its value is not
    return (surrogate + (value - surrogate.detach())).mean() * temperature**2


def _check_arguments(outputs: Tensor, teacher: Tensor, temperature: float) -> None:
    """Raise ConfigError unless these are two tensors and a number above 0."""
    check_type("outputs", outputs, Tensor, ConfigError, _LOGITS)
    check_type("teacher", teacher, Tensor, ConfigError, _LOGITS)
    check_positive("temperature", temperature, ConfigError)


def _divergence(log_p: Tensor, log_q: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """Return the value (N,) of one alpha-divergence, and its derivative (N, classes) by log q."""
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    if alpha == 1:
        return (p * log_ratio).sum(dim=1), -p
    weights = (alpha * log_ratio).exp().clamp(max=clip)  # an overflow is clipped too
    return (q * (weights - 1)).sum(dim=1) / (alpha * (alpha - 1)), -q * weights / alpha
