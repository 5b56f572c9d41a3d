"""BatchNorm statistics: measured over batches, by one process or two, or taken from the batch."""

import contextlib
import copy

import pytest
import timm
import torch
import torch.distributed as dist
from helpers.forks import run_in_processes
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from timm_autoslim import batch_statistics, calibrate, convert, sandwich_step
from timm_autoslim.errors import DataError, StaleStatisticsError
from timm_autoslim.recipes.benchmarks.lib.interrupts import Condition, Interrupt
from timm_autoslim.training.calibration import check_batch_statistics


def network():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, momentum=0.3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))


def batches(count=3, n=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 8, 8, generator=generator) + 2 for _ in range(count)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def flags(model):
    names = ("training", "momentum", "track_running_stats")
    return [[getattr(module, name, None) for name in names] for module in model.modules()]


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_statistics_are_the_average_over_the_batches():
    model, inputs = network(), batches()
    with torch.no_grad():
        outputs = [model[0](part) for part in inputs]  # (N, 4, 6, 6) each
    calibrate(model, iter(inputs))
    mean = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    var = torch.stack([output.var(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert model[1].num_batches_tracked == 3


class Readied(nn.Module):
    """As LeViT's attention: switched to evaluation mode it gets something ready, which it drops in training mode."""

    def train(self, mode=True):
        self.ready = not mode
        return super().train(mode)

    def forward(self, x):
        return x


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_override_train_are_switched_back_by_it(training):
    model = nn.Sequential(network(), Readied()).train(training)
    calibrate(model, batches())
    assert model[1].ready is not training
    with batch_statistics(model):
        pass
    assert model[1].ready is not training


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training):
    model = network().train(training)
    model[3].train(not training)
    before, weights = flags(model), state(model)
    random = torch.get_rng_state()
    calibrate(model, batches())
    assert flags(model) == before
    assert torch.equal(torch.get_rng_state(), random)  # dropout did not draw
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calibrating_twice_gives_the_same():
    model = network()
    calibrate(model, batches())
    first = state(model)
    calibrate(model, batches())
    assert_same(first, state(model))


def test_no_batches_is_an_error_that_changes_nothing():
    model = network()
    model(batches()[0])
    before, modes = state(model), flags(model)
    with pytest.raises(DataError, match=r"^batches: got none, and Sequential has 1 BatchNorms to measure; needed"):
        calibrate(model, [])
    message = r"^batches\[0\]: got a tuple; .* pass `\(inputs for inputs, _ in loader\)`"
    with pytest.raises(DataError, match=message):
        calibrate(model, [(batches()[0], torch.zeros(8))])
    assert_same(before, state(model))
    assert flags(model) == modes


def test_failure_on_the_way_restores_the_old_statistics():
    model = network()
    model(batches()[0])
    before, modes = state(model), flags(model)
    with pytest.raises(DataError, match="channels"):
        calibrate(model, [*batches(2), torch.zeros(2, 5, 8, 8)])
    assert_same(before, state(model))
    assert flags(model) == modes


def test_models_without_running_statistics_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False))
    before, modes = state(model), flags(model)
    calibrate(model, [])
    assert_same(before, state(model))
    with batch_statistics(model):
        pass
    assert flags(model) == modes


def test_an_extracted_subnet_gets_statistics_of_its_own():
    supernet = convert(timm.create_model("resnet10t", num_classes=4), torch.zeros(2, 3, 32, 32))
    model = supernet.extract(supernet.space.uniform(0.5))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == -43 for norm in norms)
    calibrate(model, [torch.randn(8, 3, 32, 32)])
    assert all(norm.num_batches_tracked == 1 for norm in norms)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_batch_statistics_normalise_by_the_batch_and_touch_no_buffer(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, drop_rate=0.5).eval()
    other = copy.deepcopy(model)
    inputs = torch.randn(8, 3, 32, 32)
    before, modes = state(model), flags(model)
    with torch.no_grad():
        with batch_statistics(model):
            outputs = model(inputs)
            check_batch_statistics(model)
        for module in other.modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        assert torch.equal(outputs, other(inputs))
    assert_same(before, state(model))
    assert flags(model) == modes


@pytest.mark.slow
@pytest.mark.parametrize("way", ["batch_statistics", "calibrate"])
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(way):
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.2), nn.Linear(2, 2)).train()
    images = torch.randn(4, 2)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    before = Condition(model)

    def act():
        if way == "calibrate":
            calibrate(model, [images])
        else:
            with batch_statistics(model), torch.no_grad():
                model(images)

    act()  # what Python and torch do once alone is done
    interrupt = Interrupt()
    interrupt.run(act)
    for line in range(1, interrupt.lines + 1):
        assert not Interrupt(line).run(act), line
        torch.set_grad_enabled(True)  # torch's own no_grad may be left open, as in any program
        model.load_state_dict(values)  # new statistics may be complete
        assert before.list_changes(model) == [], line


def test_batch_statistics_restore_after_an_error():
    model = network()
    modes = flags(model)
    with pytest.raises(ZeroDivisionError), batch_statistics(model):
        1 / 0  # noqa: B018
    assert flags(model) == modes


def test_switching_back_while_scoring_is_noticed():
    model = network()
    with batch_statistics(model):
        model.eval()
        message = r"^1: got a BatchNorm that evaluate put in evaluation mode.*; needed: batch statistics; do not call"
        with pytest.raises(StaleStatisticsError, match=message):
            check_batch_statistics(model)


class Caching(nn.Module):
    """Caches in evaluation mode a tensor of its weight, as LeViT's attention does; train() clears the cache."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm2d(3)
        self.cache = None

    def train(self, mode=True):
        self.cache = None if mode else self.cache
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.norm(x) * self.weight.view(-1, 1, 1)
        if self.cache is None:
            self.cache = self.weight.detach().clone()
        return self.norm(x) * self.cache.view(-1, 1, 1)


@pytest.mark.parametrize("training", [True, False])
def test_caches_of_evaluation_mode_do_not_outlive_a_call(training):
    model = Caching().train(training)
    calibrate(model, [torch.randn(4, 3, 2, 2)])
    assert model.cache is None
    with batch_statistics(model):
        model(torch.randn(4, 3, 2, 2))
    assert model.cache is None


# -- two processes ----------------------------------------------------------------------------------------------------


def deeper():
    """Two BatchNorms, the second behind the first, and one that no input reaches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    model.add_module("unused", Skipped())
    return model


class Skipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return x


class JointNorm(nn.SyncBatchNorm):
    """SyncBatchNorm for CPUs: statistics over the batches of all processes, with gradients."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        total = all_reduce(torch.stack([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))]))  # (2, C)
        values = dist.get_world_size() * x.numel() / x.shape[1]
        mean, var = total[0] / values, total[1] / values - (total[0] / values) ** 2
        if self.track_running_stats:
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, float(share))
                self.running_var.lerp_(var * values / (values - 1), float(share))
        wide = [part.view(-1, 1, 1) for part in (mean, var, self.weight, self.bias)]
        return (x - wide[0]) / (wide[1] + self.eps).sqrt() * wide[2] + wide[3]


def joint(model):
    """Return the model with its BatchNorms replaced, as `convert_sync_batchnorm` would."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                other = JointNorm(norm.num_features, momentum=norm.momentum)
                other._parameters, other._buffers = norm._parameters, norm._buffers
                setattr(module, name, other)
    return model


def attempt(function):
    try:
        function()
    except DataError as error:
        return str(error)
    return ""


def assert_close(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.forks
@pytest.mark.parametrize("shares", [(2, 3), (5, 0)])
def test_two_processes_measure_as_one_on_all_batches(tmp_path, shares):
    every = batches(5)

    def work(rank):
        model = deeper()
        calibrate(model, every[: shares[0]] if rank == 0 else every[shares[0] :], distributed=True)
        return state(model)

    first, second = run_in_processes(2, work, tmp_path)
    assert_same(first, second)
    alone = deeper()
    calibrate(alone, every)
    assert_close(first, state(alone))
    assert first["1.num_batches_tracked"] == 5
    assert first["unused.norm.num_batches_tracked"] == 0


@pytest.mark.forks
def test_synchronised_norms_measure_the_joined_batches(tmp_path):
    every = batches(3)

    def work(rank):
        model = joint(deeper())
        calibrate(model, [part[rank * 4 : rank * 4 + 4] for part in every])
        return state(model)

    first, second = run_in_processes(2, work, tmp_path)
    assert_close(second, first)
    alone = deeper()
    calibrate(alone, every)
    assert_close(first, state(alone))


@pytest.mark.forks
def test_processes_without_batches_are_refused_in_all_of_them(tmp_path):
    def work(rank):
        empty, uneven = deeper(), joint(deeper())
        before = state(empty), state(uneven)
        messages = [
            attempt(lambda: calibrate(empty, [], distributed=True)),
            attempt(lambda: calibrate(uneven, batches(2 + rank))),
        ]
        assert_same(before[0], state(empty))
        assert_same(before[1], state(uneven))
        return messages

    for empty, uneven in run_in_processes(2, work, tmp_path):
        assert "got none, and Sequential has 3 BatchNorms to measure" in empty
        assert "SyncBatchNorm, and more batches in one process than in another; needed: equal numbers" in uneven


@pytest.mark.forks
@pytest.mark.parametrize("synchronised", [True, False])
def test_two_processes_of_a_sandwich_are_one_if_their_norms_are_synchronised(tmp_path, synchronised):
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randn(12, 3, 8, 8, generator=generator), torch.arange(12) % 5

    def train(model, rank=None):
        supernet = convert(nn.Sequential(model, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
                           torch.zeros(2, 3, 8, 8), divisor=1, min=0.5).train()  # fmt: skip
        network = supernet
        if rank is not None:
            network = DistributedDataParallel(supernet, broadcast_buffers=False)
            if synchronised:  # only now: before, DistributedDataParallel would see that there is no GPU
                joint(supernet.model)
        optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
        for update in range(3):
            sandwich_step(
                network, supernet.space, images[rank::2] if rank is not None else images,
                labels[rank::2] if rank is not None else labels, nn.functional.cross_entropy,
                generator=torch.Generator().manual_seed(update),
                no_sync=network.no_sync if rank is not None else contextlib.nullcontext,
            )  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()
        return state(supernet.model)

    def norms():
        return deeper()[:5]

    first, second = run_in_processes(2, lambda rank: train(norms(), rank), tmp_path)
    alone = train(norms())
    assert all(torch.equal(value, second[name]) for name, value in first.items() if "running" not in name)
    if synchronised:  # running statistics, which the widest alone moved, too
        assert first["0.1.num_batches_tracked"] == 3
        for name, value in alone.items():
            torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4)
    else:
        assert not torch.allclose(first["0.3.weight"], alone["0.3.weight"], atol=1e-5, rtol=1e-4)


def pooling_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten())


@pytest.mark.parametrize(("sizes", "joined"), [([8, 8, 1], [8, 9]), ([1, 8], [9]), ([1] * 5, [5])])
def test_a_batch_of_one_image_is_joined_where_a_norm_gets_one_value_per_channel(sizes, joined):
    model, expected = pooling_network(), pooling_network()
    images = batches(1, sum(sizes))[0]
    calibrate(model, images.split(sizes))
    calibrate(expected, images.split(joined))
    assert_same(state(model), state(expected))
    assert model[2].num_batches_tracked == len(joined)


def test_batches_of_one_image_stay_where_norms_get_many_values():
    model = network()
    calibrate(model, batches(3, 1))
    assert model[1].num_batches_tracked == 3


def test_one_image_in_all_has_no_variance():
    model = pooling_network()
    before = state(model)
    with pytest.raises(DataError, match=r"got one image, .*; needed: two images or more"):
        calibrate(model, batches(1, 1))
    assert_same(state(model), before)
