import contextlib
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from timm_autoslim import convert, sandwich_step
from timm_autoslim.errors import ConfigError
from timm_autoslim.sandwich import soft_cross_entropy


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
