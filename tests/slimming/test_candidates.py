"""The candidates of a step: one step narrower, never further below a budget than needed, and ranked."""

import pytest
from helpers.searches import SIZES, make_supernet

from timm_autoslim import RANKINGS, cost
from timm_autoslim.slimming.budgets import make_budget, split_limits
from timm_autoslim.slimming.candidates import list_candidates, narrow
from timm_autoslim.slimming.goals import Goal


@pytest.fixture(scope="module")
def supernet():
    return make_supernet()


@pytest.mark.parametrize(
    ("steps", "widths"), [(1, [2, None]), (2, [8, 2, None]), (100, [14, 12, 10, 8, 6, 4, 2, None])]
)
def test_a_group_is_narrowed_in_so_many_steps(supernet, steps, widths):
    group, width = supernet.space["a"], 16
    assert group.choices == (2, 4, 6, 8, 10, 12, 14, 16)
    for narrower in widths:
        assert narrow(group, width, steps) == narrower
        width = narrower


def test_every_group_is_a_candidate_and_saves_what_it_saves(supernet):
    goal, widest = Goal(supernet, make_budget(split_limits("macs<=50%"), cost(supernet))), supernet.space.max()
    candidates = list_candidates(goal, widest, 4)
    assert [c.name for c in candidates] == list(SIZES)
    for candidate in candidates:
        assert [n for n in SIZES if candidate.widths[n] < widest[n]] == [candidate.name]
        assert candidate.saved == cost(supernet).macs - cost(supernet, candidate.widths).macs


def test_the_last_step_cuts_no_more_than_the_budget_asks_for(supernet):
    goal, widest = Goal(supernet, make_budget(split_limits("macs<=95%"), cost(supernet))), supernet.space.max()
    for candidate in list_candidates(goal, widest, 1):
        group = supernet.space[candidate.name]
        wider = min(c for c in group.choices if c > candidate.widths[candidate.name])
        assert goal.holds(candidate.widths)
        assert not goal.holds(candidate.widths.replace(candidate.name, wider))


def test_savings_of_several_limits_are_added_up_in_the_first_metric(supernet):
    goal = Goal(supernet, make_budget(split_limits("macs<=50% and params<=50%"), cost(supernet)))
    candidate, before = list_candidates(goal, supernet.space.max(), 4)[0], cost(supernet)
    (_, macs), (_, params) = goal.budget.limits
    after = cost(supernet, candidate.widths)
    assert candidate.saved == pytest.approx(before.macs - after.macs + (before.params - after.params) * macs / params)


def test_rankings_order_by_the_rise_alone_or_by_what_it_saves():
    assert list(RANKINGS) == ["loss", "per_cost"]
    assert RANKINGS["loss"](0.5, 10.0) == 0.5
    assert RANKINGS["per_cost"](0.5, 10.0) == 0.05
    # a fall is good however much it saves, and a step that saves nothing has no share
    assert RANKINGS["per_cost"](-0.5, 10.0) == RANKINGS["per_cost"](-0.5, 0.0) == -0.5
    assert RANKINGS["per_cost"](0.5, -1.0) == 0.5
