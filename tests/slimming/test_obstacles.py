"""A budget out of reach: the rule that binds is named, with a value that would do."""

import re

import pytest
import torch
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim import convert, parse_budgets
from timm_autoslim.errors import BudgetError

IMAGE = torch.zeros(1, 3, 8, 8)


class Stages(nn.Sequential):
    """Groups, one behind the other."""

    def __init__(self):
        super().__init__(*(nn.Conv2d(i, o, 3, padding=1) for i, o in [(3, 32), (32, 32), (32, 64), (64, 32), (32, 4)]))


def refuse(budget, model=None, **rules):
    """Return what the error says can be done."""
    with pytest.raises(BudgetError, match="out of reach") as error:
        parse_budgets(convert(model or TwoGroups(32), IMAGE, **rules), [budget])
    return str(error.value).partition("; ")[2]


SHARE = r"(0\.\d+)"


@pytest.mark.parametrize(
    ("budget", "rules", "remedy", "change"),
    [
        ("macs<=5%", {}, f"lower `min` to {SHARE} in convert\\(\\) \\(--min-width\\)", lambda share: {"min": share}),
        ("macs<=20%", {"min": 0.5}, f"lower `min` to {SHARE} in convert", lambda share: {"min": share}),
        ("macs<=20%", {"divisor": 32}, r"lower `divisor` to (\d+) \(--divisor\)", lambda n: {"divisor": int(n)}),
        (
            "params<=10%",
            {"min": 0.5, "divisor": 32},
            rf"lower `min` to {SHARE} and `divisor` to 1 \(--min-width, --divisor\)",
            lambda share: {"min": share, "divisor": 1},
        ),
        (
            "macs<=20%",
            {"choices": ["75%"]},
            rf"begin `choices` \(--choices\) at {SHARE} of a group's channels",
            lambda share: {"choices": [share]},
        ),
    ],
)
def test_the_rule_that_binds_is_named_with_a_value_that_would_do(budget, rules, remedy, change):
    text = refuse(budget, **rules)
    match = re.search(f"raise the budget, or {remedy}", text)
    assert match, text
    parse_budgets(convert(TwoGroups(32), IMAGE, **rules | change(float(match[1]))), [budget])


def test_a_value_is_the_largest_that_would_do():
    text = refuse("macs<=20%", min=0.5)
    share = float(re.search(SHARE, text)[1])
    assert f"`min` to {share:g}" in text
    with pytest.raises(BudgetError, match="out of reach"):
        parse_budgets(convert(TwoGroups(32), IMAGE, min=share + 0.02), ["macs<=20%"])


def test_frozen_modules_are_named_where_no_other_rule_would_do():
    text = refuse("macs<=10%", Stages(), freeze=["2"])
    expected = r"^raise the budget, or take '2' out of `freeze` \(--freeze\): ([\d,]+) is possible then$"
    least = int(re.search(expected, text)[1].replace(",", ""))
    parse_budgets(convert(Stages(), IMAGE, min=1, divisor=1), {"macs": least})
    assert "freeze less (--freeze): without ['0', '2'] " in refuse("params<=1%", Stages(), freeze=["0", "2"])


def test_what_the_model_itself_fixes_is_told():
    text = refuse("macs<=10", TwoGroups(32))
    assert text.startswith('write "10%" for a share of the widest, raise the budget: with the least width of every')
    assert "inspect(model) names what is fixed" in text


def test_budgets_of_memory_name_the_rules_without_values():
    text = refuse("peak_bytes<=1k", Stages(), freeze=["0"], min=0.5)
    assert text == "raise the budget or lower `min` in convert() (--min-width) or freeze less (--freeze)"
