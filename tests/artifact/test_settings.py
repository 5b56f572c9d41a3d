"""Settings as JSON can say them, and the names in a forward's code, which tell what it cannot read."""

import functools

import pytest
from torch import nn
from torch.nn import functional as F

from timm_autoslim.artifact.settings import ForwardNames, is_compared, read_setting


def scale_by(factor):
    return lambda x, bias=0.0: factor * x + bias


def count():
    calls = 0

    def run(x):
        nonlocal calls
        calls += 1
        return x

    return run


def recurse(depth):
    def run(x):
        return run(x) if depth else x

    return run


@pytest.mark.parametrize(
    ("value", "setting"),
    [
        (3, 3), (0.5, 0.5), (float("-inf"), "-inf"), ("mean", "mean"), ([1, 2], (1, 2)), ((1.5, None), (1.5, None)),
        ({}, None), (object(), None), ([object()], None), ([0.5] * 99, None), ([1] * 99, (1,) * 99),
        (F.relu, "relu()"), (nn.ReLU, "ReLU()"), (scale_by, "scale_by()"),
        (scale_by(2), "<lambda>(bias=0.0, factor=2)"),
        (functools.partial(F.leaky_relu, 0.1, inplace=True), "leaky_relu(0=0.1)"),
        (count(), "run()"), (recurse(1), "run(depth=1, run=run(depth=1, run=run(depth=1)))"),
    ],
)  # fmt: skip
def test_a_value_is_said_as_json_can_say_it(value, setting):
    assert read_setting(value) == setting


def test_what_serves_training_or_is_a_note_is_not_compared():
    assert is_compared("scale", 2)
    assert is_compared("path", 2)
    assert not is_compared("path", "runs/1")
    assert not is_compared("drop_rate", 0.5)


class Net(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * self.scale


def test_a_forward_may_read_what_its_code_mentions_and_what_torch_reads():
    net = nn.Sequential(Net(3, 4, 1), nn.ReLU())
    names = ForwardNames(net)
    assert names.may_read(net[0], "scale")
    assert names.may_read(net[0], "padding_mode")
    assert names.may_read(net[1], "anything")
    assert not names.may_read(net[0], "created")
