"""Budgets are read, and refused, by name."""

import re

import pytest

from timm_autoslim import Budget, Cost
from timm_autoslim.errors import BudgetError
from timm_autoslim.slimming.budgets import make_budget, parse_amount, split_limits


def read_budget(text, widest):
    return make_budget(split_limits(text), widest)


def test_a_budget_has_a_slug_for_names_of_files():
    budget = Budget((("macs", 3e6), ("params", 2e6)), "macs<=60% and params<=2M")
    assert budget.slug == "macs-60pct-params-2M"


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
        BudgetError, match=re.escape(f'the budget: got {text!r}; needed: a number, "300M", "1.2G" or "60%"')
    ):
        parse_amount(text, 1000)


@pytest.mark.parametrize("text", [0, -3, "0%", "-3M", "inf", float("nan")])
def test_a_budget_must_be_positive(text):
    with pytest.raises(BudgetError, match=re.escape(f"the budget: got {text!r}; needed: a positive number")):
        parse_amount(text, 1000)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("macs<=300", {"macs": 300}),
        ("macs <= 60% and params<=2k", {"macs": 600, "params": 2000}),
        ("params<=1.5M   and  macs<=12.5%", {"params": 1.5e6, "macs": 125}),
        ("macs=60%", {"macs": 600}),
        ("macs=60% and params = 2k", {"macs": 600, "params": 2000}),
        (" 60% ", {"macs": 600}),
        ("3e2", {"macs": 300}),
    ],
)
def test_limits_are_read(text, limits):
    budget = read_budget(text, Cost(1000, 10**6))
    assert dict(budget.limits) == pytest.approx(limits)
    assert read_budget(budget.text, Cost(1000, 10**6)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the budget: got ''; needed: a text of METRIC<=AMOUNT joined by `and`, such as"),
        ("300MB", "the budget: got '300MB'; needed: a number"),
        ("macs>=5", "the budget: got 'macs>=5'; needed: a text of METRIC<=AMOUNT"),
        ("macs<=5 and", "needed: a text of METRIC<=AMOUNT|the budget: got '5 and'"),
        ("macs<=5 and 7", "the budget: got 'macs<=5 and 7'; needed: a text of METRIC<=AMOUNT"),
        ("macs<=5, params<=7", "the budget: got '5, params<=7'; needed: a number"),
        ("flops<=5", "metric: got 'flops'; needed: one of ['macs', 'params', 'peak_bytes', 'latency_ms']"),
        ("macs<=", "the budget: got ''; needed: a number"),
        ("macs<=-3", "the budget: got '-3'; needed: a positive number"),
        ("macs<=5 and macs<=7", "the budget: got 'macs<=5 and macs<=7', which limits macs twice"),
    ],
)
def test_malformed_limits_are_refused(text, message):
    with pytest.raises(BudgetError, match="|".join(re.escape(m) for m in message.split("|"))):
        read_budget(text, Cost(1000, 10**6))


def test_a_budget_holds_where_all_its_limits_do():
    budget = Budget((("macs", 100.0), ("params", 10.0)))
    assert budget.holds(Cost(100, 10))
    assert budget.exceeded(Cost(100, 11)) == (("params", 10.0),)
    assert budget.exceeded(Cost(101, 11)) == budget.limits
    assert not budget.holds(Cost(101, 1))
    assert budget.tightest(Cost(50, 6)) == ("params", 10.0)
    assert budget.used(Cost(50, 6)) == 0.6
    assert budget.used(Cost(200, 6)) == 2


def test_a_budget_has_a_text_and_is_equal_by_its_limits():
    made, read = (
        Budget((("macs", 300.0), ("params", 2000.5))),
        read_budget("macs<=300 and params<=2000.5", Cost(1, 1)),
    )
    assert made.text == read.text == "macs<=300 and params<=2000.5"
    assert read_budget("macs<=30%", Cost(1000, 1)) == Budget((("macs", 300.0),)) != Budget((("macs", 301.0),))
    assert read_budget("macs<= 30%", Cost(1000, 1)).text == "macs<=30%"
    assert made.metrics == ("macs", "params")


def test_a_budget_of_what_was_not_counted_is_told():
    with pytest.raises(BudgetError, match="peak_bytes: got a cost that was counted without it"):
        Budget((("peak_bytes", 1.0),)).holds(Cost(1, 1))
