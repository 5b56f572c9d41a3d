"""Budgets are read, and refused, by name."""

import re

import pytest

from timm_autoslim import Budget, Cost
from timm_autoslim.errors import BudgetError
from timm_autoslim.slimming.budgets import parse_amount, parse_limits


@pytest.mark.parametrize(
    ("text", "number"),
    [(300e6, 300e6), (5, 5), ("300M", 300e6), ("1.2G", 1.2e9), ("12k", 12e3), ("12K", 12e3), ("60%", 600), (" 7 ", 7),
     ("12.5%", 125), ("3e5", 3e5),
     ("20Ki", 20480), ("1.5Mi", 1572864), ("1Gi", 2**30)],
)  # fmt: skip
def test_budgets_are_read(text, number):
    assert parse_amount(text, 1000) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("text", ["", "M", "%", "three", "300MB", "2B", "3 000", None, [3], True])
def test_a_budget_that_is_no_number_is_refused(text):
    with pytest.raises(
        BudgetError, match=re.escape(f'got the budget {text!r}; needed: a number, "300M", "1.2G" or "60%"')
    ):
        parse_amount(text, 1000)


@pytest.mark.parametrize("text", [0, -3, "0%", "-3M", "inf", float("nan")])
def test_a_budget_must_be_positive(text):
    with pytest.raises(BudgetError, match=re.escape(f"got the budget {text!r}; needed: a positive number")):
        parse_amount(text, 1000)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("macs<=300", {"macs": 300}),
        ("macs <= 60% and params<=2k", {"macs": 600, "params": 2000}),
        ("params<=1.5M   and  macs<=12.5%", {"params": 1.5e6, "macs": 125}),
    ],
)
def test_several_limits_are_read(text, limits):
    assert dict(parse_limits(text, Cost(1000, 10**6)).limits) == pytest.approx(limits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got the budget ''; needed: a text of METRIC<=AMOUNT joined by `and`, such as"),
        ("50%", "got the budget '50%'; needed: a text of METRIC<=AMOUNT"),
        ("macs>=5", "got the budget 'macs>=5'; needed: a text of METRIC<=AMOUNT"),
        ("macs<=5 and", "needed: a text of METRIC<=AMOUNT|got the budget '5 and'"),
        ("macs<=5 and 7", "got the budget 'macs<=5 and 7'; needed: a text of METRIC<=AMOUNT"),
        ("macs<=5, params<=7", "got the budget '5, params<=7'; needed: a number"),
        ("flops<=5", "got a budget in 'flops'; needed: one of ['macs', 'params', 'peak_bytes', 'latency_ms']"),
        ("macs<=", "got the budget ''; needed: a number"),
        ("macs<=-3", "got the budget '-3'; needed: a positive number"),
        ("macs<=5 and macs<=7", "got the budget 'macs<=5 and macs<=7', which limits macs twice"),
    ],
)
def test_malformed_limits_are_refused(text, message):
    with pytest.raises(BudgetError, match="|".join(re.escape(m) for m in message.split("|"))):
        parse_limits(text, Cost(1000, 10**6))


def test_a_budget_holds_where_all_its_limits_do():
    budget = Budget((("macs", 100.0), ("params", 10.0)))
    assert budget.holds(Cost(100, 10))
    assert budget.exceeded(Cost(100, 11)) == (("params", 10.0),)
    assert budget.exceeded(Cost(101, 11)) == budget.limits
    assert not budget.holds(Cost(101, 1))
    assert budget.tightest(Cost(50, 6)) == ("params", 10.0)
    assert budget.used(Cost(50, 6)) == 0.6
    assert budget.used(Cost(200, 6)) == 2
