import contextlib
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from timm_autoslim import convert, sandwich_step
from timm_autoslim.errors import ConfigError
from timm_autoslim.training.distillation import adaptive_alpha_divergence, soft_cross_entropy
from timm_autoslim.training.dropout import disable_dropout
from timm_autoslim.training.sandwich import resize_images


def small_supernet(norm=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return convert(nn.Sequential(*layers), torch.zeros(2, 3, 8, 8), divisor=1, min=0.25).train()


def batch(n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def generator():
    return torch.Generator().manual_seed(7)


def gradients_of_each_subnet(supernet, inputs, targets, **kwargs):
    parameters = list(supernet.parameters())
    seen = []

    def backward(loss):
        seen.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    step = sandwich_step(
        supernet, supernet.space, inputs, targets, F.cross_entropy, generator=generator(), backward=backward, **kwargs
    )
    return seen, step


def test_gradient_is_the_one_computed_by_hand():
    supernet = small_supernet()
    inputs, targets = batch()
    step = sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=generator(), n=4)
    found = [parameter.grad.clone() for parameter in supernet.parameters()]
    supernet.zero_grad()

    draw = generator()
    space = supernet.space
    subnets = [space.max(), space.min(), space.sample(draw), space.sample(draw)]
    assert list(step.widths) == subnets
    logits = supernet(inputs, subnets[0])
    loss = F.cross_entropy(logits, targets)
    soft = torch.softmax(logits.detach(), dim=1)
    for widths in subnets[1:]:
        loss = loss - (soft * torch.log_softmax(supernet(inputs, widths), dim=1)).sum(dim=1).mean()
    loss.backward()
    for parameter, gradient in zip(supernet.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(step.loss, loss.detach())


def test_narrow_subnets_learn_from_the_widest_alone():
    supernet = small_supernet()
    inputs, targets = batch()
    before, _ = gradients_of_each_subnet(supernet, inputs, targets)
    after, _ = gradients_of_each_subnet(supernet, inputs, (targets + 1) % 5)
    assert any(not torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    for first, second in zip(before[1:], after[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert any(gradient.abs().sum() > 0 for gradient in first)


def test_the_teacher_is_detached():
    supernet = small_supernet()
    inputs, targets = batch()
    seen, step = gradients_of_each_subnet(supernet, inputs, targets, n=2)
    weight = seen[1][0]  # (8, 3, 3, 3) of the first convolution, under the narrowest
    width = next(iter(step.widths[1].values()))
    assert weight[:width].abs().sum() > 0
    assert weight[width:].abs().sum() == 0
    assert not step.outputs.requires_grad
    assert not any(loss.requires_grad for loss in step.losses)


def test_distillation_differs_from_hard_labels():
    supernet = small_supernet()
    inputs, targets = batch()
    soft, _ = gradients_of_each_subnet(supernet, inputs, targets)
    hard, _ = gradients_of_each_subnet(
        supernet, inputs, targets, distill=lambda outputs, teacher: F.cross_entropy(outputs, targets)
    )
    assert all(torch.equal(a, b) for a, b in zip(soft[0], hard[0], strict=True))
    for first, second in zip(soft[1:], hard[1:], strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_soft_cross_entropy_has_the_gradient_of_the_divergence():
    outputs = torch.randn(6, 4, requires_grad=True)
    teacher = torch.randn(6, 4)
    (first,) = torch.autograd.grad(soft_cross_entropy(outputs, teacher), outputs)
    divergence = F.kl_div(outputs.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    (second,) = torch.autograd.grad(divergence, outputs)
    torch.testing.assert_close(first, second)


# --------------------------------------------------------------------------------------------- distillation losses


def logits(seed, n=64, classes=6, spread=2.0):
    return spread * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, outputs, teacher, **kwargs):
    outputs = outputs.clone().requires_grad_()
    value = loss(outputs, teacher, **kwargs)
    (gradient,) = torch.autograd.grad(value, outputs)
    return value.detach(), gradient


def test_temperature_one_changes_no_bit():
    for dtype in (torch.float32, torch.bfloat16):
        outputs, teacher = logits(0).to(dtype), logits(1).to(dtype)
        value, gradient = value_and_gradient(soft_cross_entropy, outputs, teacher, temperature=1.0)
        plain = value_and_gradient(lambda o, t: F.cross_entropy(o.float(), t.float().softmax(dim=1)), outputs, teacher)
        assert torch.equal(value, plain[0])
        assert torch.equal(gradient, plain[1])


def test_temperature_softens_both_and_scales_by_its_square():
    outputs, teacher, temperature = logits(0), logits(1), 3.0
    value, gradient = value_and_gradient(soft_cross_entropy, outputs, teacher, temperature=temperature)
    p, q = ((x.double() / temperature).softmax(dim=1) for x in (teacher, outputs))
    assert value.item() == pytest.approx(9 * -(p * q.log()).sum().item() / 64, rel=1e-6)
    torch.testing.assert_close(gradient.double(), temperature * (q - p) / 64, atol=1e-8, rtol=1e-5)


def alpha_divergence_by_hand(outputs, teacher, temperature, clip):
    """The same in plain Python numbers: the mean value, the gradient row by row, which alpha won, and if it clipped."""
    total, gradients, won, clipped = 0.0, [], set(), False
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
        won.add(alpha)
        total += value * temperature**2 / len(outputs)
        scale = temperature / len(outputs)  # T^2, and 1 / T of the inner derivative
        gradients.append([scale * (c - b * sum(slope)) for b, c in zip(q, slope, strict=True)])
    return total, torch.tensor(gradients, dtype=torch.float64), won, clipped


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_adaptive_alpha_divergence_is_the_one_computed_by_hand(temperature):
    outputs, teacher = logits(0, spread=3.0), logits(1, spread=1.5)
    expected, gradients, won, clipped = alpha_divergence_by_hand(outputs, teacher, temperature, clip=5.0)
    assert won == {-1, 1}
    assert clipped
    value, gradient = value_and_gradient(adaptive_alpha_divergence, outputs, teacher, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient.double(), gradients, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 2.0])
def test_unclipped_the_gradient_is_that_of_the_divergence(alpha):
    outputs, teacher = logits(0, spread=1.0), logits(1, spread=1.0)
    given = {"alpha_min": alpha, "alpha_max": alpha, "clip": math.inf}
    value, gradient = value_and_gradient(adaptive_alpha_divergence, outputs, teacher, **given)

    def divergence(outputs, teacher):
        p, q = teacher.softmax(dim=1), outputs.softmax(dim=1)
        return ((p**alpha * q ** (1 - alpha)).sum(dim=1) - 1).mean() / (alpha * (alpha - 1))

    exact = value_and_gradient(divergence, outputs.double(), teacher.double())
    torch.testing.assert_close(value.double(), exact[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), exact[1], atol=1e-7, rtol=1e-4)


def test_a_subnet_that_agrees_with_its_teacher_has_nothing_to_learn():
    value, gradient = value_and_gradient(adaptive_alpha_divergence, logits(0), logits(0) + 3)
    assert abs(value.item()) < 1e-6
    assert gradient.abs().max() < 1e-8


@pytest.mark.parametrize("loss", [soft_cross_entropy, adaptive_alpha_divergence])
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
    with pytest.raises(ConfigError, match=r"got the alphas 0 and 1.0; needed: two that are not 0"):
        adaptive_alpha_divergence(logits(0), logits(1), alpha_min=0)


# ------------------------------------------------------------------------------------------------------- teachers


def test_subnets_learn_from_the_teacher_and_the_widest_does_not():
    supernet = small_supernet()
    inputs, targets = batch()
    asked = []

    def teach(seed):
        def teacher(given):
            asked.append((given, torch.is_grad_enabled()))
            return logits(seed, n=12, classes=5)

        return teacher

    alone, first, second, other = (
        gradients_of_each_subnet(supernet, inputs, labels, teacher=teacher)[0]
        for labels, teacher in (
            (targets, None),
            (targets, teach(1)),
            (targets, teach(2)),
            ((targets + 1) % 5, teach(1)),
        )
    )
    assert [(given is inputs, grad) for given, grad in asked] == [(True, False)] * 3  # once a step, without gradient
    for taught in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(alone[0], taught[0], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))
    for index in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first[index], other[index], strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(first[index], second[index], strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(first[index], alone[index], strict=True))


def test_a_teacher_with_the_widest_output_is_the_widest():
    supernet = small_supernet(norm=False)
    inputs, targets = batch()
    alone, _ = gradients_of_each_subnet(supernet, inputs, targets)
    taught, _ = gradients_of_each_subnet(supernet, inputs, targets, teacher=supernet)
    for first, second in zip(alone, taught, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_widest_may_learn_from_the_teacher_too():
    supernet = small_supernet()
    inputs, targets = batch()
    soft = logits(1, n=12, classes=5)
    _, step = gradients_of_each_subnet(supernet, inputs, targets, teacher=lambda _: soft, teach_widest=0.25)
    _, plain = gradients_of_each_subnet(supernet, inputs, targets, teacher=lambda _: soft)
    expected = 0.75 * F.cross_entropy(step.outputs, targets) + 0.25 * soft_cross_entropy(step.outputs, soft)
    torch.testing.assert_close(step.losses[0], expected)
    assert step.losses[1:] == plain.losses[1:]


def test_teachers_that_cannot_teach_are_refused():
    supernet = small_supernet()
    for share, teacher in ((0.5, None), (1.5, supernet), (-0.1, supernet)):
        with pytest.raises(
            ConfigError, match=rf"got teach_widest={share}; needed: a share from 0 to 1, and a teacher="
        ):
            gradients_of_each_subnet(supernet, *batch(), teacher=teacher, teach_widest=share)
    with pytest.raises(ConfigError, match=r"a teacher with outputs \(12, 7\), but the model has \(12, 5\)"):
        gradients_of_each_subnet(supernet, *batch(), teacher=lambda _: torch.zeros(12, 7))


def test_the_widest_alone_trains_as_an_ordinary_model():
    supernet, plain = small_supernet(), small_supernet().model
    inputs, targets = batch()

    def fail(*_):
        pytest.fail("nothing but the widest is needed")

    step = sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=generator(),
                         only_widest=True, teacher=fail, sample=fail, no_sync=fail)  # fmt: skip
    F.cross_entropy(plain(inputs), targets).backward()
    assert step.widths == (supernet.space.max(),)
    assert len(step.losses) == 1
    for ours, expected in zip(supernet.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


# -------------------------------------------------------------------------------------------------------- dropout


class Dropping(nn.Module):
    """Drops in each of the ways that models have: by modules, and by a function in its own forward."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.path = nn.Conv2d(8, 8, 3, padding=1), DropPath(rate)
        self.drop, self.head = nn.Dropout2d(rate), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.drop(x + self.path(self.inner(x)))
        return self.head(F.dropout(x.mean((2, 3)), p=self.rate, training=self.training))


def losses_with_dropout(rate, only):
    torch.manual_seed(0)
    supernet = convert(Dropping(rate), torch.zeros(2, 3, 8, 8), divisor=1, min=0.25).train()
    inputs, targets = batch()
    step = sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=generator(),
                         teacher=lambda _: logits(1, n=12, classes=5), regularize_widest_only=only)  # fmt: skip
    assert all(module.training for module in supernet.modules())
    return [loss.item() for loss in step.losses]


def test_only_the_widest_may_drop():
    without, all_drop, widest_drops = (losses_with_dropout(*g) for g in ((0.0, False), (0.5, False), (0.5, True)))
    assert widest_drops[1:] == without[1:]  # to the bit, batch statistics of BatchNorm included
    assert widest_drops[0] == all_drop[0]
    assert all(a != b for a, b in zip(all_drop, without, strict=True))
    assert losses_with_dropout(0.0, True) == without


def test_without_dropout_reaches_functions_and_attention():
    x = torch.randn(4, 6, 8)
    attention = nn.MultiheadAttention(8, 2, dropout=0.9, batch_first=True).train()
    parallel = nn.TransformerEncoderLayer(8, 2, dropout=0.9, batch_first=True).train()
    calls = [
        lambda: F.dropout(x, 0.9), lambda: F.dropout(input=x, p=0.9), lambda: torch.dropout(x, 0.9, True),
        lambda: F.dropout1d(x, 0.9), lambda: F.alpha_dropout(x, 0.9, True),
        lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.9),
        lambda: F.scaled_dot_product_attention(x, x, x, None, 0.9), lambda: attention(x, x, x)[0], lambda: parallel(x),
    ]  # fmt: skip
    for call in calls:
        assert not torch.equal(call(), call())
        with disable_dropout(nn.ModuleList((attention, parallel))):
            assert torch.equal(call(), call())
        assert not torch.equal(call(), call())
    with disable_dropout(attention):
        torch.testing.assert_close(
            F.scaled_dot_product_attention(x, x, x, None, 0.9), F.scaled_dot_product_attention(x, x, x)
        )


def test_without_dropout_leaves_modules_as_they_were():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5).eval(), nn.BatchNorm1d(3))
    with contextlib.suppress(ArithmeticError), disable_dropout(model):
        assert [module.training for module in model] == [False, False, True]
        raise ArithmeticError
    assert [module.training for module in model] == [True, False, True]


# ---------------------------------------------------------------------------------------------------------- steps


def test_all_but_the_last_subnet_run_without_synchronising():
    supernet = small_supernet()
    inputs, targets = batch()
    events = []

    @contextlib.contextmanager
    def no_sync():
        events.append("enter")
        yield
        events.append("leave")

    def backward(loss):
        events.append("backward")
        loss.backward()

    hook = supernet.model.register_forward_pre_hook(lambda *_: events.append("forward"))
    sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=generator(), n=3,
                  backward=backward, no_sync=no_sync)  # fmt: skip
    hook.remove()
    assert events == ["enter", "forward", "backward", "leave"] * 2 + ["forward", "backward"]


def test_widths_come_from_the_generator_or_from_sample():
    supernet = small_supernet()
    inputs, targets = batch()
    steps = [gradients_of_each_subnet(supernet, inputs, targets)[1] for _ in range(2)]
    assert steps[0].widths == steps[1].widths
    half = supernet.space.uniform(0.5)
    _, step = gradients_of_each_subnet(supernet, inputs, targets, n=3, sample=lambda _: half)
    assert step.widths == (supernet.space.max(), supernet.space.min(), half)


def test_only_the_widest_moves_the_running_statistics():
    supernet, alone = small_supernet(), small_supernet()
    inputs, targets = batch()
    sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=generator())
    alone(inputs)
    for ours, expected in zip(supernet.buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, expected)


def test_all_but_the_widest_see_images_of_random_sizes_and_the_widths_stay():
    supernet = small_supernet()
    inputs, targets = batch()
    seen = []

    def network(images, widths):
        seen.append((tuple(images.shape), widths))
        return supernet(images, widths)

    def step(seed, sizes):
        seen.clear()
        draw = torch.Generator().manual_seed(seed)
        sandwich_step(network, supernet.space, inputs, targets, F.cross_entropy, generator=draw, sizes=sizes)
        return list(seen)

    plain, smaller = step(3, ()), step(3, (6, 5, 4))
    assert [widths for _, widths in plain] == [widths for _, widths in smaller]
    assert {shape for shape, _ in plain} == {(12, 3, 8, 8)} == {smaller[0][0]}
    drawn = [shape[2:] for seed in range(8) for shape, _ in step(seed, (6, 5, 4))[1:]]
    assert set(drawn) == {(6, 6), (5, 5), (4, 4)}
    assert step(3, (6, 5, 4)) == smaller
    assert torch.equal(resize_images(inputs, 8), inputs)
    torch.testing.assert_close(resize_images(torch.ones(1, 3, 8, 8), 5), torch.ones(1, 3, 5, 5))


def test_fewer_than_two_subnets_are_refused():
    supernet = small_supernet()
    with pytest.raises(ConfigError, match=r"n=1, but the sandwich needs the widest and the narrowest: n >= 2"):
        sandwich_step(supernet, supernet.space, *batch(), F.cross_entropy, generator=generator(), n=1)


def _train_in_parallel(rank, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    supernet = small_supernet(norm=False)
    network = DistributedDataParallel(supernet, broadcast_buffers=False)
    inputs, targets = (part[rank::2] for part in batch())
    sandwich_step(network, supernet.space, inputs, targets, F.cross_entropy, generator=generator(),
                  no_sync=network.no_sync)  # fmt: skip
    torch.save([parameter.grad for parameter in supernet.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_the_joined_batch(tmp_path):
    mp.spawn(_train_in_parallel, (str(tmp_path),), nprocs=2)
    supernet = small_supernet(norm=False)
    sandwich_step(supernet, supernet.space, *batch(), F.cross_entropy, generator=generator())
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for parameter, first, second in zip(supernet.parameters(), *ranks, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, parameter.grad, atol=1e-6, rtol=1e-5)
