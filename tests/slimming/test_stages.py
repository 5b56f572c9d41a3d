"""Which searches lead to the budgets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_autoslim import Budget, Cost, plan_stages
from timm_autoslim.errors import BudgetError

WIDEST = Cost(macs=10**6, params=10**5)


def make_budget(macs=None, params=None):
    shares = {"macs": macs, "params": params}
    return Budget(tuple((m, share * WIDEST.pick(m)) for m, share in shares.items() if share))


@pytest.mark.parametrize(("share", "count"), [(0.9, 1), (0.5, 1), (0.49, 2), (0.25, 2), (0.24, 3), (0.05, 5)])
def test_no_stage_leaves_less_than_half(share, count):
    stages = plan_stages([make_budget(share)], WIDEST)
    assert len(stages) == count
    assert [stage.asked for stage in stages] == [False] * (count - 1) + [True]
    assert [stage.start for stage in stages] == [None, *(stage.budget for stage in stages[:-1])]


@given(st.floats(0.001, 0.999), st.floats(0.001, 1.2))
def test_every_stage_leaves_the_same_shares_and_the_last_is_the_budget(macs, params):
    budget = make_budget(macs, params)
    stages = plan_stages([budget], WIDEST)
    assert stages[-1].budget is budget
    for metric, share in (("macs", macs), ("params", params)):
        before = WIDEST.pick(metric)
        for stage in stages:
            limit = dict(stage.budget.limits)[metric]
            assert limit / before == pytest.approx(share ** (1 / len(stages)), rel=2e-3)
            assert limit / before > 0.499
            before = limit


def test_a_tighter_budget_starts_from_the_network_before():
    half, quarter, tiny = make_budget(0.5), make_budget(0.3), make_budget(0.1)
    stages = plan_stages([half, quarter, tiny], WIDEST)
    assert [(stage.start, stage.asked) for stage in stages[:2]] == [(None, True), (half, True)]
    assert [stage.asked for stage in stages[2:]] == [False, True]  # from 30 to 17 to 10 per cent
    assert stages[2].start is quarter
    assert stages[3].start is stages[2].budget


def test_a_budget_of_another_metric_starts_from_the_original():
    macs, params, both = make_budget(0.8), make_budget(params=0.7), make_budget(0.6, 0.6)
    assert [stage.start for stage in plan_stages([macs, params, both], WIDEST)] == [None, None, None]


def test_rules_that_count_from_the_widest_have_one_search_for_each_budget():
    budgets = [make_budget(0.5), make_budget(0.1)]
    stages = plan_stages(budgets, WIDEST, from_widest=True)
    assert [(stage.budget, stage.start, stage.asked) for stage in stages] == [
        (budget, None, True) for budget in budgets
    ]


def test_what_the_original_is_within_is_refused():
    with pytest.raises(BudgetError, match="a budget that the original is within"):
        plan_stages([make_budget(0.5), make_budget(1.0)], WIDEST)
