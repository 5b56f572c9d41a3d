import copy

import pytest
import timm
import torch
from torch import nn

from timm_autoslim import batch_statistics, calibrate, convert
from timm_autoslim.calibration import check_batch_statistics
from timm_autoslim.errors import DataError, StaleStatisticsError


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
    with pytest.raises(DataError, match=r"calibrate\(\) got no batches, but Sequential has 1 BatchNorms to measure"):
        calibrate(model, [])
    with pytest.raises(DataError, match=r"the first batch is a tuple: .* pass `\(inputs for inputs, _ in loader\)`"):
        calibrate(model, [(batches()[0], torch.zeros(8))])
    assert_same(before, state(model))
    assert flags(model) == modes


def test_failure_on_the_way_restores_the_old_statistics():
    model = network()
    model(batches()[0])
    before, modes = state(model), flags(model)
    with pytest.raises(RuntimeError, match="channels"):
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
    plain = supernet.extract(supernet.space.uniform(0.5))
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 0 for norm in norms)
    calibrate(plain, [torch.randn(8, 3, 32, 32)])
    assert all(norm.num_batches_tracked == 1 for norm in norms)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_batch_statistics_normalise_by_the_batch_and_touch_no_buffer(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, drop_rate=0.5).eval()
    twin = copy.deepcopy(model)
    inputs = torch.randn(8, 3, 32, 32)
    before, modes = state(model), flags(model)
    with torch.no_grad():
        with batch_statistics(model):
            outputs = model(inputs)
            check_batch_statistics(model)
        for module in twin.modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        assert torch.equal(outputs, twin(inputs))
    assert_same(before, state(model))
    assert flags(model) == modes


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
        with pytest.raises(StaleStatisticsError, match=r"1: .*evaluation mode"):
            check_batch_statistics(model)


class Caching(nn.Module):
    """Keeps in evaluation mode what it computed from its weight, as LeViT's attention does, until it is trained."""

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
