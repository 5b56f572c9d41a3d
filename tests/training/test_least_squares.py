"""Least squares of one layer: rows, moments, weights."""

import pytest
import torch
from torch import nn

from timm_autoslim.training.least_squares import (
    Layer,
    compare,
    get_weight,
    set_weight,
    solve,
    sum_moments,
    take_outputs,
    take_rows,
)

LAYERS = [
    (nn.Linear(6, 4), (5, 6)),
    (nn.Linear(6, 4), (5, 3, 7, 6)),
    (nn.Conv2d(6, 4, 1), (5, 6, 7, 7)),
    (nn.Conv2d(6, 4, (3, 5), (2, 1), (1, 2), dilation=(1, 2), bias=False), (5, 6, 11, 13)),
    (nn.Conv2d(6, 4, 3, 2, 1, groups=2), (5, 6, 9, 8)),
    (nn.Conv1d(6, 4, 3, 2, 1, dilation=2, groups=2), (5, 6, 17)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=str)
def test_rows_times_weight_are_the_layers_outputs(module, shape):
    inputs = torch.randn(*shape)
    outputs = take_outputs(module, module(inputs))  # (G, N, positions, O)
    expected = take_rows(module, inputs) @ get_weight(module)[:, None]
    if module.bias is not None:
        expected = expected + module.bias.reshape(len(expected), 1, 1, -1)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=str)
def test_some_positions_are_those_of_all(module, shape):
    inputs = torch.randn(*shape)
    rows, outputs = take_rows(module, inputs), take_outputs(module, module(inputs))
    positions = torch.randperm(rows.shape[2])[:3]
    assert torch.equal(take_rows(module, inputs, positions), rows[:, :, positions])
    assert torch.equal(take_outputs(module, module(inputs), positions), outputs[:, :, positions])


def test_channels_are_taken_where_the_layer_has_them():
    outputs, channels = torch.randn(2, 5, 4, 6), ((0, 1), (3, 1))
    conv, linear = nn.Conv2d(1, 2, 1), nn.Linear(1, 2)
    taken = take_outputs(conv, outputs, channels=channels)
    assert torch.equal(taken, take_outputs(conv, outputs[:, [0, 3]]))
    taken = take_outputs(linear, outputs, channels=channels)
    assert torch.equal(taken, take_outputs(linear, outputs[..., [0, 3]]))


def test_many_small_batches_have_the_moments_of_one(monkeypatch):
    torch.manual_seed(0)
    module, inputs, outputs = nn.Linear(6, 4), torch.randn(200, 6), torch.randn(200, 4)
    layer = Layer("fc", module, centered=False)
    expected = sum_moments(layer, [inputs], [outputs])
    monkeypatch.setattr("timm_autoslim.training.least_squares._TOGETHER", 100)
    for part, of_one in zip(sum_moments(layer, inputs.split(3), outputs.split(3)), expected, strict=True):
        assert part.count == of_one.count
        torch.testing.assert_close(part.xx, of_one.xx, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part.xy, of_one.xy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=str)
def test_a_weight_that_is_set_is_the_weight(module, shape):
    weight = torch.randn_like(get_weight(module))
    set_weight(module, weight, torch.zeros(len(weight), weight.shape[-1]))
    assert torch.equal(get_weight(module), weight)


@pytest.mark.parametrize("bias", [True, False])
def test_the_weights_that_made_the_outputs_are_found(bias):
    torch.manual_seed(0)
    target, module = nn.Linear(6, 4, bias=bias), nn.Linear(6, 4, bias=bias)
    batches = [torch.randn(40, 6) + 1 for _ in range(3)]
    with torch.no_grad():
        solving, testing = sum_moments(
            Layer("fc", module, centered=False), batches, [target(batch) for batch in batches]
        )
    assert (solving.count, testing.count) == (96, 24)
    found = solve(solving.center() if bias else solving, get_weight(module).double(), 1e-9)
    torch.testing.assert_close(found.float(), get_weight(target), rtol=1e-3, atol=1e-4)
    shift = solving.y - (solving.x[:, None] @ found)[:, 0] if bias else torch.zeros_like(solving.y)
    assert compare(testing, found, shift) < 1e-6 < compare(testing, get_weight(module).double(), shift)


def test_a_large_ridge_keeps_the_weights_and_dead_inputs_keep_theirs():
    torch.manual_seed(0)
    module, inputs = nn.Linear(6, 4), torch.randn(200, 6)
    inputs[:, 2] = 0
    with torch.no_grad():
        solving, _ = sum_moments(Layer("fc", module, centered=False), [inputs], [torch.randn(200, 4)])
    weight = get_weight(module).double()
    torch.testing.assert_close(solve(solving, weight, 1e9), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(solve(solving, weight, 1e-3)[0, 2], weight[0, 2])
    with torch.no_grad():
        constant, _ = sum_moments(Layer("fc", module, centered=False), [torch.zeros(50, 6)], [torch.randn(50, 4)])
    assert solve(constant, weight, 1e-3) is None


def test_without_a_shift_the_mean_of_the_outputs_does_not_matter():
    torch.manual_seed(0)
    module, inputs = nn.Conv2d(3, 4, 1, bias=False), torch.randn(50, 3, 4, 4)
    with torch.no_grad():
        _, testing = sum_moments(Layer("conv", module, centered=True), [inputs], [module(inputs) + 5])
    weight = get_weight(module).double()
    assert compare(testing, weight, None) < 1e-6
    assert compare(testing, weight, torch.zeros_like(testing.y)) > 1
