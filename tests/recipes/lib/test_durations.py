"""How long stages take."""

from types import SimpleNamespace

import pytest
import torch
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim import Budget, Stage, convert
from timm_autoslim.recipes.lib import durations
from timm_autoslim.recipes.lib.durations import time_step, write_time


@pytest.mark.parametrize(("seconds", "text"), [(61, "61 s"), (700, "12 min"), (9000, "2.5 h")])
def test_a_duration_is_written_in_the_unit_that_suits(seconds, text):
    assert write_time(seconds) == text


def test_a_step_is_timed_on_a_copy():
    model = nn.Linear(4, 2)
    assert time_step(model, torch.zeros(3, 4)) > 0
    assert model.weight.grad is None
    assert model.training


def test_stages_are_counted_and_timed(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 4.0, 9.0])  # made, two stages, asked
    monkeypatch.setattr(durations.time, "perf_counter", lambda: next(clock))
    stages = durations.Stages(SimpleNamespace(print=print))
    stages.count = 2
    stages.announce("the original")
    stages.announce("search")
    assert capsys.readouterr().out == "\n[1 of 2] the original\n\n[2 of 2] search\n"
    assert stages.describe_times() == "All took 9 s: 3 s, 5 s."


def test_more_of_everything_takes_longer():
    supernet = convert(TwoGroups(), torch.zeros(1, 3, 8, 8))
    plan = [Stage(Budget((("macs", 20.0),)), start=None, asked=True)]
    args = SimpleNamespace(reconstruct=100, epochs=0)
    few = durations.estimate_stages(args, supernet, plan, 0.1, durations.Counts(200, 50, 10))
    assert few == pytest.approx(0.1 * (10 * len(supernet.space) * 50 / 2 + 4 * 100 + 2 * 10))
    assert durations.estimate_stages(args, supernet, plan * 2, 0.1, durations.Counts(200, 50, 10)) == 2 * few
