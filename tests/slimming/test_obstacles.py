"""A budget out of reach: the rule that binds is named, with a value that would do."""

import re

import pytest
import timm
import torch
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim import convert, cost, parse_budgets
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
        (
            "macs<=5%",
            {},
            f"lower `min` to {SHARE} \\(--min-width\\)",
            lambda share: {"min": share},
        ),
        ("macs<=20%", {"min": 0.5}, f"lower `min` to {SHARE} \\(--min-width", lambda share: {"min": share}),
        ("macs<=20%", {"divisor": 32}, r"lower `divisor` to (\d+) \(--divisor\)", lambda n: {"divisor": int(n)}),
        (
            "params<=10%",
            {"min": 0.5, "divisor": 32},
            rf"lower `min` to {SHARE} \(--min-width\) and lower `divisor` to 1 \(--divisor\)",
            lambda share: {"min": share, "divisor": 1},
        ),
        (
            "macs<=20%",
            {"choices": ["75%"]},
            rf"begin `choices` at {SHARE} \(--choices\)",
            lambda share: {"choices": [share]},
        ),
    ],
)
def test_the_rule_that_binds_is_named_with_a_value_that_would_do(budget, rules, remedy, change):
    text = refuse(budget, **rules)
    match = re.search(f"raise the budget,(?: or)? {remedy}", text)
    assert match, text
    parse_budgets(convert(TwoGroups(32), IMAGE, **rules | change(float(match[1]))), [budget])


def test_a_value_is_the_largest_that_would_do():
    text = refuse("macs<=20%", min=0.5)
    share = float(re.search(SHARE, text)[1])
    assert f"lower `min` to {share:g} (--min-width)" in text
    assert "convert()" not in text  # who gives flags calls nothing
    with pytest.raises(BudgetError, match="out of reach"):
        parse_budgets(convert(TwoGroups(32), IMAGE, min=share + 0.02), ["macs<=20%"])


def test_frozen_modules_are_named_where_no_other_rule_would_do():
    text = refuse("macs<=10%", Stages(), freeze=["2"])
    expected = r"^raise the budget, or take '2' out of `freeze` \(--freeze\): ([\d,]+) is possible then$"
    least = int(re.search(expected, text)[1].replace(",", ""))
    supernet = convert(Stages(), IMAGE)
    assert cost(supernet, supernet.space.min()).macs == least
    assert "`divisor` to 1 (--divisor) and take '0' and '2' out of" in refuse("params<=1%", Stages(), freeze=["0", "2"])


def test_what_the_model_itself_fixes_is_told():
    text = refuse("macs<=10", TwoGroups(32))
    start = 'a share of the widest is written "10%"; raise the budget: with the least width of every group there are '
    assert re.match(start + r"[\d,]+ macs; ", text)
    assert "`inspect` names what is fixed" in text


def test_budgets_of_memory_name_the_rules_without_values():
    text = refuse("peak_bytes<=1k", Stages(), freeze=["0"], min=0.5)
    hints = "a lower `min` (--min-width), less in `freeze` (--freeze)"
    assert text == f"raise the budget; may help: {hints}"
    assert refuse("macs<=1% and peak_bytes<=50%", Stages(), freeze=["0"], min=0.5) == text
    assert "may help: a lower `min` and `divisor` together" in refuse("peak_bytes<=1k", min=1.0, divisor=64)


def follow(remedy, rules):
    """Return the arguments of convert() after a remedy, which may be several changes."""
    rules = dict(rules)
    for change in re.split(r" and (?=lower|set|begin|leave|take)", remedy):
        if match := re.match(r"take ((?:'[^']+'(?: and )?)+) out of", change):
            globs = [rules["freeze"]] if isinstance(rules["freeze"], str) else rules["freeze"]
            rules["freeze"] = [glob for glob in globs if repr(glob) not in match[1]]
        elif change.startswith("leave out"):
            del rules["choices"]
        else:
            _, rule, glob, number = re.match(
                r"(lower|set|begin) `(\w+)`(?: of '(.+)')? (?:to|at) ([\d.]+)", change
            ).groups()
            number = float(number) if "." in number else int(number)
            value = rules.get(rule)
            value = [number, *(value[glob] if glob else value)] if rule == "choices" else number
            rules[rule] = {**rules[rule], glob: value} if glob else value
    return rules


@pytest.mark.parametrize(
    "rules",
    [
        {},
        pytest.param({"min": 0.5}, marks=pytest.mark.slow),
        pytest.param({"min": "50%", "divisor": 16}, marks=pytest.mark.slow),
        {"min": 6},
        pytest.param({"min": {"layer1*": 6, "layer2*": 0.5}}, marks=pytest.mark.slow),
        pytest.param({"divisor": 16}, marks=pytest.mark.slow),
        {"divisor": {"layer*": 16}},
        {"choices": ["75%"]},
        pytest.param({"choices": [6]}, marks=pytest.mark.slow),
        {"choices": {"layer1*": [0.5], "layer4*": [24, 32]}},
        pytest.param({"freeze": "layer1", "divisor": 16}, marks=pytest.mark.slow),
        pytest.param({"freeze": ["layer1", "layer2"]}, marks=pytest.mark.slow),
        {"freeze": ["layer4"], "min": 4, "choices": {"layer1*": [12]}},
    ],
    ids=str,
)
def test_every_remedy_brings_the_budget_within_reach(rules):
    images = torch.zeros(1, 3, 32, 32)
    model = timm.create_model("resnet10t", num_classes=10, channels=[16, 16, 32, 32], stem_width=8)
    supernet, followed = convert(model, images, **rules), 0
    for budget in ["macs<=40%", "macs<=10%", "macs<=3%", "params<=20%", "params<=3%", "macs<=30% and params<=3%"]:
        try:
            parse_budgets(supernet, [budget])
        except BudgetError as error:
            text = str(error)
        else:
            continue
        first, *remedies = re.split(r", (?:or )?(?=raise|lower|set|begin|leave|take)", text.partition("; ")[2])
        assert first == "raise the budget"
        assert remedies, text
        for remedy in remedies:
            other = convert(model, images, **follow(remedy, rules))
            parse_budgets(other, [budget])
            if match := re.search(r": ([\d,]+) is possible then$", remedy):
                assert match[1].replace(",", "") in map(str, vars(cost(other, other.space.min())).values())
            followed += 1
    assert followed


def test_a_number_of_channels_is_answered_by_a_smaller_number():
    assert re.match(r"raise the budget, or lower `min` to [1-5]$", refuse("macs<=2%", min=6, divisor=1))
    text = refuse("macs<=3%", Stages(), min={"0": 6, "*": 12})
    assert re.match(r"raise the budget, or lower `min` of '\*' to \d$", text)
    assert re.match(r"raise the budget, or begin `choices` at \d \(--choices\)$", refuse("macs<=3%", choices=[12]))


@pytest.mark.slow
def test_the_default_divisor_is_answered_by_what_that_argument_gives():
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    images, budget = torch.zeros(1, 3, 32, 32), {"macs": "5%"}
    with pytest.raises(BudgetError, match=r"out of reach: .* or set `divisor` to 1 \(--divisor\)$"):
        parse_budgets(convert(model, images), budget)
    parse_budgets(convert(model, images, divisor=1), budget)
    with pytest.raises(BudgetError, match="out of reach"):
        parse_budgets(convert(model, images, divisor=2), budget)
