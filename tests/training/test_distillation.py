"""Distillation losses: values and gradients against formulas written out by hand, at every temperature and type."""

import math

import pytest
import torch
from helpers.sandwich import make_logits
from torch.nn import functional as F

from timm_autoslim.errors import ConfigError
from timm_autoslim.training.distillation import DISTILLATION_LOSSES, adaptive_alpha_divergence, soft_cross_entropy


def value_and_gradient(loss, outputs, teacher, **kwargs):
    outputs = outputs.clone().requires_grad_()
    value = loss(outputs, teacher, **kwargs)
    (gradient,) = torch.autograd.grad(value, outputs)
    return value.detach(), gradient


def test_soft_cross_entropy_has_the_gradient_of_the_divergence():
    outputs = torch.randn(6, 4, requires_grad=True)
    teacher = torch.randn(6, 4)
    (first,) = torch.autograd.grad(soft_cross_entropy(outputs, teacher), outputs)
    divergence = F.kl_div(outputs.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    (second,) = torch.autograd.grad(divergence, outputs)
    torch.testing.assert_close(first, second)


def test_temperature_one_changes_no_bit():
    for dtype in (torch.float32, torch.bfloat16):
        outputs, teacher = make_logits(0).to(dtype), make_logits(1).to(dtype)
        value, gradient = value_and_gradient(soft_cross_entropy, outputs, teacher, temperature=1.0)
        other = value_and_gradient(lambda o, t: F.cross_entropy(o.float(), t.float().softmax(dim=1)), outputs, teacher)
        assert torch.equal(value, other[0])
        assert torch.equal(gradient, other[1])


def test_temperature_softens_both_and_scales_by_its_square():
    outputs, teacher, temperature = make_logits(0), make_logits(1), 3.0
    value, gradient = value_and_gradient(soft_cross_entropy, outputs, teacher, temperature=temperature)
    p, q = ((x.double() / temperature).softmax(dim=1) for x in (teacher, outputs))
    assert value.item() == pytest.approx(9 * -(p * q.log()).sum().item() / 64, rel=1e-6)
    torch.testing.assert_close(gradient.double(), temperature * (q - p) / 64, atol=1e-8, rtol=1e-5)


def alpha_divergence_by_hand(outputs, teacher, temperature, clip):
    """Return the mean value, the gradient row by row, the alphas that were larger, and whether a weight was clipped."""
    total, gradients, alphas, clipped = 0.0, [], set(), False
    for z, t in zip(outputs.double().tolist(), teacher.double().tolist(), strict=True):
        q = [math.exp(a / temperature) for a in z]
        p = [math.exp(a / temperature) for a in t]
        q, p = [a / sum(q) for a in q], [a / sum(p) for a in p]
        options = []
        weights = [min(b / a, clip) for a, b in zip(p, q, strict=True)]
        options.append((-1, sum(b * (w - 1) for b, w in zip(q, weights, strict=True)) / 2,
                        [b * w for b, w in zip(q, weights, strict=True)]))  # fmt: skip
        options.append((1, sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), [-a for a in p]))
        alpha, value, slope = max(options, key=lambda option: option[1])
        clipped |= alpha == -1 and clip in weights
        alphas.add(alpha)
        total += value * temperature**2 / len(outputs)
        scale = temperature / len(outputs)  # T^2, and 1 / T of the inner derivative
        gradients.append([scale * (c - b * sum(slope)) for b, c in zip(q, slope, strict=True)])
    return total, torch.tensor(gradients, dtype=torch.float64), alphas, clipped


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_adaptive_alpha_divergence_is_the_one_computed_by_hand(temperature):
    outputs, teacher = make_logits(0, spread=3.0), make_logits(1, spread=1.5)
    expected, gradients, alphas, clipped = alpha_divergence_by_hand(outputs, teacher, temperature, clip=5.0)
    assert alphas == {-1, 1}
    assert clipped
    value, gradient = value_and_gradient(adaptive_alpha_divergence, outputs, teacher, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient.double(), gradients, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 2.0])
def test_unclipped_the_gradient_is_that_of_the_divergence(alpha):
    outputs, teacher = make_logits(0, spread=1.0), make_logits(1, spread=1.0)
    settings = {"alpha_min": alpha, "alpha_max": alpha, "clip": math.inf}
    value, gradient = value_and_gradient(adaptive_alpha_divergence, outputs, teacher, **settings)

    def divergence(outputs, teacher):
        p, q = teacher.softmax(dim=1), outputs.softmax(dim=1)
        return ((p**alpha * q ** (1 - alpha)).sum(dim=1) - 1).mean() / (alpha * (alpha - 1))

    exact = value_and_gradient(divergence, outputs.double(), teacher.double())
    torch.testing.assert_close(value.double(), exact[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), exact[1], atol=1e-7, rtol=1e-4)


def test_a_subnet_that_agrees_with_its_teacher_has_nothing_to_learn():
    value, gradient = value_and_gradient(adaptive_alpha_divergence, make_logits(0), make_logits(0) + 3)
    assert abs(value.item()) < 1e-6
    assert gradient.abs().max() < 1e-8


@pytest.mark.parametrize("loss", DISTILLATION_LOSSES.values(), ids=DISTILLATION_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_have_a_finite_loss_and_gradient(loss, dtype):
    extreme = torch.tensor([[6e4, -6e4, 0.0], [-6e4, 6e4, 0.0], [0.0, 0.0, 0.0], [200.0, 0.0, -200.0]], dtype=dtype)
    for teacher in (extreme, extreme.flip(0), extreme.roll(1, 1), -extreme):
        for temperature in (0.5, 1.0, 4.0):
            value, gradient = value_and_gradient(loss, extreme, teacher, temperature=temperature)
            assert value.isfinite()
            assert gradient.isfinite().all()
            assert gradient.dtype == dtype


def test_an_alpha_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"^alpha_min: got 0; needed: a number that is not 0$"):
        adaptive_alpha_divergence(make_logits(0), make_logits(1), alpha_min=0)


def test_losses_are_picked_by_name():
    assert dict(DISTILLATION_LOSSES) == {"kl": soft_cross_entropy, "alpha": adaptive_alpha_divergence}
    with pytest.raises(ConfigError, match=r"^distillation loss: got 'KL'; needed: one of \['kl', 'alpha'\]"):
        DISTILLATION_LOSSES.pick("KL")
