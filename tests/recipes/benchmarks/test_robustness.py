"""Interrupts at lines and calls from threads: a small version of the benchmark, and its table."""

import json

import pytest
from helpers.recipes import RECIPES, launch
from torch import nn

from timm_autoslim.recipes.benchmarks import robustness
from timm_autoslim.recipes.benchmarks.lib.interrupts import Condition, Interrupt


@pytest.mark.slow
@pytest.mark.parametrize("action", robustness.ACTIONS)
def test_an_interrupt_at_any_line_leaves_the_model_whole(action):
    total = robustness.count_lines(action)
    assert total > 1000
    assert robustness.interrupt_lines(action, range(1, total + 1, total // 40)) == []


@pytest.mark.slow
def test_threads_get_the_outputs_of_their_own_widths():
    assert robustness.call_from_threads(400, 4) == {"right": 400, "named": 0, "wrong": 0}


@pytest.mark.slow
def test_a_fault_is_seen(monkeypatch):
    def leave_training(bench):
        flags = vars(bench.supernet.model.bn1)
        flags["training"] = False
        flags["training"] = True

    monkeypatch.setitem(robustness.ACTIONS, "narrow", robustness.Action("a change", leave_training))
    (fault,) = robustness.interrupt_lines("narrow", range(1, robustness.count_lines("narrow") + 1))
    assert "training of bn1" in fault["faults"]
    assert fault["place"].startswith(__file__)


def test_a_line_is_where_it_raises():
    steps = []

    def act():
        steps.append(1)
        steps.append(2)

    whole = Interrupt()
    assert whole.run(act)
    assert whole.lines == 2
    steps.clear()
    second = Interrupt(2)
    assert not second.run(act)
    assert steps == [1]
    assert second.place.startswith(__file__)


def test_what_changes_in_a_model_is_listed():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = Condition(model)
    assert before.list_changes(model) == []
    model[1].running_mean += 1
    assert before.list_changes(model) == ["the values of 1.running_mean"]
    assert before.list_changes(model, values=False) == []
    model[0].weight = nn.Parameter(model[0].weight[:1])
    assert "_parameters of 0" in before.list_changes(model)
    model.register_forward_hook(print)
    assert "hooks of the model" in before.list_changes(model)


@pytest.mark.slow
def test_a_run_goes_on_and_writes_its_table(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    page.write_text("<!-- robustness -->\n<!-- /robustness -->\n")
    row = {"action": "narrow", "lines": 18000, "every": 1000, "start": 1, "tried": 18, "faults": []}
    results.write_text(json.dumps(row) + "\n")
    arguments = [
        "--actions",
        "narrow",
        "threads",
        "--every",
        "1000",
        "--calls",
        "40",
        "--results",
        results,
        "--table",
        page,
    ]
    done = launch(str(RECIPES / "benchmarks" / "robustness.py"), *map(str, arguments))
    assert done.returncode == 0, done.stderr
    assert "| KeyboardInterrupt in a narrow forward, one in 1,000 of 18,000 lines | 18 | 18 | | 0 |" in page.read_text()
    assert "| 40 | 40 | 0 | 0 |" in page.read_text()
