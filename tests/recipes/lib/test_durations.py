"""How long stages take."""

import contextlib
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


def test_stages_are_counted_and_timed_over_all_calls(monkeypatch, capsys, tmp_path):
    path, accelerator = tmp_path / "durations.json", SimpleNamespace(print=print, is_main_process=True)
    clock = iter([0.0, 4.0, 9.0])  # made, the second stage, asked
    monkeypatch.setattr(durations.time, "perf_counter", lambda: next(clock))
    stages = durations.Stages(accelerator, path)
    stages.count = 2
    stages.announce("original", "the original")
    stages.announce("search", "search for 50%")
    assert capsys.readouterr().out == "\n[1 of 2] the original\n\n[2 of 2] search for 50%\n"
    assert stages.describe_times() == "All took 9 s: 4 s, 5 s."
    clock = iter([100.0, 101.0, 103.0])  # of a call that is interrupted in its second stage
    with contextlib.suppress(KeyboardInterrupt), durations.Stages(accelerator, path) as stages:
        stages.announce("original", "the original (done before)")
        stages.announce("search", "search for 50%")
        raise KeyboardInterrupt
    clock = iter([0.0, 1.0, 3.0])
    stages = durations.Stages(accelerator, path)
    stages.announce("original", "the original (done before)")
    stages.announce("search", "search for 50%")
    assert stages.describe_times() == "All took 15 s in 3 calls: 6 s, 9 s."


def test_a_call_that_is_refused_leaves_no_times_and_damaged_ones_count_for_none(tmp_path):
    path = tmp_path / "durations.json"
    with durations.Stages(SimpleNamespace(is_main_process=True), path):
        pass
    assert not path.exists()
    path.write_text("[1]")
    stages = durations.Stages(SimpleNamespace(print=print, is_main_process=True), path)
    stages.announce("original", "the original")
    assert " calls" not in stages.describe_times()


def test_more_of_everything_takes_longer():
    supernet = convert(TwoGroups(), torch.zeros(1, 3, 8, 8))
    plan = [Stage(Budget((("macs", 20.0),)), start=None, asked=True)]
    args = SimpleNamespace(reconstruct=100, epochs=0)
    few = durations.estimate_stages(args, supernet, plan, 0.1, durations.Counts(200, 50, 10))
    assert few == pytest.approx(0.1 * (10 * len(supernet.space) * 50 / 2 + 4 * 100 + 2 * 10))
    assert durations.estimate_stages(args, supernet, plan * 2, 0.1, durations.Counts(200, 50, 10)) == 2 * few
