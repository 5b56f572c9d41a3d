"""The sandwich rule: gradients against those computed by hand, teachers, image sizes, dropout, and two processes."""

import contextlib
import functools

import pytest
import torch
from helpers.forks import run_in_processes
from helpers.sandwich import make_batch, make_generator, make_logits, small_supernet
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from timm_autoslim import convert, sandwich_step
from timm_autoslim.errors import ConfigError
from timm_autoslim.training.distillation import soft_cross_entropy
from timm_autoslim.training.sandwich import resize_images


def gradients_of_each_subnet(supernet, inputs, targets, **kwargs):
    parameters = list(supernet.parameters())
    gradients = []

    def backward(loss):
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    step = sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=make_generator(),
                         backward=backward, **kwargs)  # fmt: skip
    return gradients, step


def test_gradient_is_the_one_computed_by_hand():
    supernet = small_supernet()
    inputs, targets = make_batch()
    step = sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=make_generator(), n=4)
    gradients = [parameter.grad.clone() for parameter in supernet.parameters()]
    supernet.zero_grad()

    generator = make_generator()
    space = supernet.space
    subnets = [space.max(), space.min(), space.sample(generator), space.sample(generator)]
    assert list(step.widths) == subnets
    logits = supernet(inputs, subnets[0])
    loss = F.cross_entropy(logits, targets)
    soft = torch.softmax(logits.detach(), dim=1)
    for widths in subnets[1:]:
        loss = loss - (soft * torch.log_softmax(supernet(inputs, widths), dim=1)).sum(dim=1).mean()
    loss.backward()
    for parameter, gradient in zip(supernet.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(step.loss, loss.detach())


def test_narrow_subnets_learn_from_the_widest_alone():
    supernet = small_supernet()
    inputs, targets = make_batch()
    before, _ = gradients_of_each_subnet(supernet, inputs, targets)
    after, _ = gradients_of_each_subnet(supernet, inputs, (targets + 1) % 5)
    assert any(not torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    for first, second in zip(before[1:], after[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert any(gradient.abs().sum() > 0 for gradient in first)


def test_the_teacher_is_detached():
    supernet = small_supernet()
    inputs, targets = make_batch()
    gradients, step = gradients_of_each_subnet(supernet, inputs, targets, n=2)
    weight = gradients[1][0]  # (8, 3, 3, 3) of the first convolution, under the narrowest
    width = next(iter(step.widths[1].values()))
    assert weight[:width].abs().sum() > 0
    assert weight[width:].abs().sum() == 0
    assert not step.outputs.requires_grad
    assert not any(loss.requires_grad for loss in step.losses)


def test_distillation_differs_from_hard_labels():
    supernet = small_supernet()
    inputs, targets = make_batch()
    soft, _ = gradients_of_each_subnet(supernet, inputs, targets)
    hard, _ = gradients_of_each_subnet(
        supernet, inputs, targets, distill=lambda outputs, teacher: F.cross_entropy(outputs, targets)
    )
    assert all(torch.equal(a, b) for a, b in zip(soft[0], hard[0], strict=True))
    for first, second in zip(soft[1:], hard[1:], strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- teachers ---------------------------------------------------------------------------------------------------------


def test_subnets_learn_from_the_teacher_and_the_widest_does_not():
    supernet = small_supernet()
    inputs, targets = make_batch()
    calls = []

    def teach(seed):
        def teacher(images):
            calls.append((images, torch.is_grad_enabled()))
            return make_logits(seed, n=12, classes=5)

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
    assert [(images is inputs, grad) for images, grad in calls] == [(True, False)] * 3  # once a step, no gradient
    for gradients in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(alone[0], gradients[0], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))
    for index in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first[index], other[index], strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(first[index], second[index], strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(first[index], alone[index], strict=True))


def test_a_teacher_with_the_widest_output_is_the_widest():
    supernet = small_supernet(norm=False)
    inputs, targets = make_batch()
    alone, _ = gradients_of_each_subnet(supernet, inputs, targets)
    with_teacher, _ = gradients_of_each_subnet(supernet, inputs, targets, teacher=supernet)
    for first, second in zip(alone, with_teacher, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_widest_may_learn_from_the_teacher_too():
    supernet = small_supernet()
    inputs, targets = make_batch()
    soft = make_logits(1, n=12, classes=5)
    _, step = gradients_of_each_subnet(supernet, inputs, targets, teacher=lambda _: soft, teach_widest=0.25)
    _, other = gradients_of_each_subnet(supernet, inputs, targets, teacher=lambda _: soft)
    expected = 0.75 * F.cross_entropy(step.outputs, targets) + 0.25 * soft_cross_entropy(step.outputs, soft)
    torch.testing.assert_close(step.losses[0], expected)
    assert step.losses[1:] == other.losses[1:]


def test_teachers_that_cannot_teach_are_refused():
    supernet = small_supernet()
    for share, teacher in ((0.5, None), (1.5, supernet), (-0.1, supernet)):
        message = rf"^teach_widest: got {share}; needed: a share from 0 to 1, and a teacher= if it is above 0$"
        with pytest.raises(ConfigError, match=message):
            gradients_of_each_subnet(supernet, *make_batch(), teacher=teacher, teach_widest=share)
    message = r"^teacher: got logits of the shape \(12, 7\); needed: the shape of the model's outputs, \(12, 5\); use a"
    with pytest.raises(ConfigError, match=message):
        gradients_of_each_subnet(supernet, *make_batch(), teacher=lambda _: torch.zeros(12, 7))


def test_the_widest_alone_trains_as_an_ordinary_model():
    supernet, model = small_supernet(), small_supernet().model
    inputs, targets = make_batch()

    def fail(*_):
        pytest.fail("nothing but the widest is needed")

    step = sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=make_generator(),
                         only_widest=True, teacher=fail, sample=fail, no_sync=fail)  # fmt: skip
    F.cross_entropy(model(inputs), targets).backward()
    assert step.widths == (supernet.space.max(),)
    assert len(step.losses) == 1
    for parameter, expected in zip(supernet.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


# -- dropout ----------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Drops in each of the ways that models have: by modules, and by a function that its forward calls."""

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
    inputs, targets = make_batch()
    step = sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=make_generator(),
                         teacher=lambda _: make_logits(1, n=12, classes=5), regularize_widest_only=only)  # fmt: skip
    assert all(module.training for module in supernet.modules())
    return [loss.item() for loss in step.losses]


def test_only_the_widest_may_drop():
    cases = ((0.0, False), (0.5, False), (0.5, True))
    without, all_drop, widest_drops = (losses_with_dropout(rate, only) for rate, only in cases)
    assert widest_drops[1:] == without[1:]  # to the bit, batch statistics of BatchNorm included
    assert widest_drops[0] == all_drop[0]
    assert all(a != b for a, b in zip(all_drop, without, strict=True))
    assert losses_with_dropout(0.0, True) == without


# -- steps ------------------------------------------------------------------------------------------------------------


def test_all_but_the_last_subnet_run_without_synchronising():
    supernet = small_supernet()
    inputs, targets = make_batch()
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
    sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=make_generator(), n=3,
                  backward=backward, no_sync=no_sync)  # fmt: skip
    hook.remove()
    assert events == ["enter", "forward", "backward", "leave"] * 2 + ["forward", "backward"]


def test_widths_come_from_the_generator_or_from_sample():
    supernet = small_supernet()
    inputs, targets = make_batch()
    steps = [gradients_of_each_subnet(supernet, inputs, targets)[1] for _ in range(2)]
    assert steps[0].widths == steps[1].widths
    half = supernet.space.uniform(0.5)
    _, step = gradients_of_each_subnet(supernet, inputs, targets, n=3, sample=lambda _: half)
    assert step.widths == (supernet.space.max(), supernet.space.min(), half)


def test_only_the_widest_moves_the_running_statistics():
    supernet, alone = small_supernet(), small_supernet()
    inputs, targets = make_batch()
    sandwich_step(supernet, supernet.space, inputs, targets, F.cross_entropy, generator=make_generator())
    alone(inputs)
    for buffer, expected in zip(supernet.buffers(), alone.buffers(), strict=True):
        assert torch.equal(buffer, expected)


def test_all_but_the_widest_get_images_of_random_sizes_and_the_widths_stay():
    supernet = small_supernet()
    inputs, targets = make_batch()
    calls = []

    def network(images, widths):
        calls.append((tuple(images.shape), widths))
        return supernet(images, widths)

    def step(seed, sizes):
        calls.clear()
        generator = make_generator(seed)
        sandwich_step(network, supernet.space, inputs, targets, F.cross_entropy, generator=generator, sizes=sizes)
        return list(calls)

    usual, smaller = step(3, ()), step(3, (6, 5, 4))
    assert [widths for _, widths in usual] == [widths for _, widths in smaller]
    assert {shape for shape, _ in usual} == {(12, 3, 8, 8)} == {smaller[0][0]}
    sides = [shape[2:] for seed in range(8) for shape, _ in step(seed, (6, 5, 4))[1:]]
    assert set(sides) == {(6, 6), (5, 5), (4, 4)}
    assert step(3, (6, 5, 4)) == smaller
    assert torch.equal(resize_images(inputs, 8), inputs)
    torch.testing.assert_close(resize_images(torch.ones(1, 3, 8, 8), 5), torch.ones(1, 3, 5, 5))


@pytest.mark.parametrize("n", [1, 0, 2.5, None, True])
def test_fewer_than_two_subnets_are_refused(n):
    supernet = small_supernet()
    message = f"^n: got {n}; needed: an integer of at least 2, for the widest and the narrowest subnet$"
    with pytest.raises(ConfigError, match=message):
        sandwich_step(supernet, supernet.space, *make_batch(), F.cross_entropy, generator=make_generator(), n=n)


@pytest.mark.forks
def test_losses_that_are_not_one_number_are_refused_by_the_argument():
    supernet = small_supernet()
    inputs, targets = make_batch()
    step = functools.partial(sandwich_step, supernet, supernet.space, inputs, targets, generator=make_generator())
    with pytest.raises(ConfigError, match=r"^loss_fn: got a tensor of the shape \(.*; needed: one number .*\.mean\(\)"):
        step(functools.partial(F.cross_entropy, reduction="none"))
    with pytest.raises(ConfigError, match=r"^loss_fn: got a float"):
        step(lambda outputs, targets: 1.0)
    with pytest.raises(ConfigError, match=r"^distill: got a tensor of the shape"):
        step(F.cross_entropy, distill=lambda outputs, teacher: (outputs - teacher).square())
    assert "outputs" not in repr(step(F.cross_entropy))


def test_two_processes_have_the_gradient_of_the_joined_batch(tmp_path):
    def train(rank):
        supernet = small_supernet(norm=False)
        network = DistributedDataParallel(supernet, broadcast_buffers=False)
        inputs, targets = (part[rank::2] for part in make_batch())
        sandwich_step(network, supernet.space, inputs, targets, F.cross_entropy, generator=make_generator(),
                      no_sync=network.no_sync)  # fmt: skip
        return [parameter.grad for parameter in supernet.parameters()]

    gradients = run_in_processes(2, train, tmp_path)
    supernet = small_supernet(norm=False)
    sandwich_step(supernet, supernet.space, *make_batch(), F.cross_entropy, generator=make_generator())
    for parameter, first, second in zip(supernet.parameters(), *gradients, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, parameter.grad, atol=1e-6, rtol=1e-5)
