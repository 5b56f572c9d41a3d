"""Widths within a budget, whatever the metric does as groups narrow."""

import re

import pytest
import torch
from helpers.latencies import fake_times
from helpers.marks import slow_but
from helpers.models import TwoGroups, randomise
from helpers.searches import IMAGE, SIZES, Branches, LatencyFunction, aligned, charge, in_step
from torch import nn

from timm_autoslim import Budget, Conditions, LatencyTable, baseline, convert, cost, parse_budgets, search, uniform_at
from timm_autoslim.errors import BudgetError
from timm_autoslim.slimming.budgets import make_budget, parse_amount, split_limits
from timm_autoslim.slimming.goals import Goal, fill, find_subnet, find_uniform, widen


@pytest.fixture(scope="module")
def supernet():
    return convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))


@pytest.fixture
def branches():
    return convert(randomise(Branches()), IMAGE, min=2, divisor=2)


def test_a_budget_out_of_reach_is_refused_with_what_the_narrowest_reaches(supernet):
    narrowest = cost(supernet, supernet.space.min())
    assert find_subnet(Goal(supernet, Budget((("macs", narrowest.macs),)))) == supernet.space.min()
    message = (
        rf"the budget of {narrowest.params - 1:,} params is out of reach: the narrowest subnet of the search space has "
        rf"{narrowest.params:,} \(\d+\.\d% of the widest\); raise the budget, lower `min` to 0\.\d+"
    )
    with pytest.raises(BudgetError, match=message):
        find_subnet(Goal(supernet, Budget((("params", narrowest.params - 1),))))
    with pytest.raises(BudgetError, match="out of reach"):
        uniform_at(supernet, "params", narrowest.params - 1)


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("budget", ["95%", "50%", "25%", "12%"])
def test_uniform_at_is_the_widest_uniform_network_within_the_budget(supernet, metric, budget):
    space, whole = supernet.space, cost(supernet)
    number = parse_amount(budget, whole.pick(metric))
    widths = uniform_at(supernet, metric, budget)
    assert cost(supernet, widths).pick(metric) <= number
    ratios = [i / 640 for i in range(1, 641)]
    within = [w for w in (space.uniform(r, exact=True) for r in ratios) if cost(supernet, w).pick(metric) <= number]
    assert cost(supernet, widths).macs == max(cost(supernet, w).macs for w in within)
    assert abs(widths["stem"] / 32 - widths["inner"] / 64) <= 1 / 32


def test_uniform_at_of_all_and_of_more_is_the_widest(supernet):
    assert uniform_at(supernet, "macs", "100%") == supernet.space.max()
    assert uniform_at(supernet, "params", 1e12) == supernet.space.max()


def test_uniform_at_refuses_malformed_budgets(supernet):
    with pytest.raises(BudgetError, match="metric: got 'latency'; needed: one of"):
        uniform_at(supernet, "latency", "50%")
    with pytest.raises(BudgetError, match="the budget: got 'half'"):
        uniform_at(supernet, "macs", "half")


def test_budgets_come_in_the_order_of_a_descent(supernet):
    whole = cost(supernet)
    found = parse_budgets(supernet, ["macs<=90% and params<=30%", "macs<=40%", "params<=60%"])
    assert [dict(b.limits) for b in found] == [
        {"params": 0.6 * whole.params},
        {"macs": 0.4 * whole.macs},
        {"macs": 0.9 * whole.macs, "params": 0.3 * whole.params},
    ]


@pytest.mark.parametrize("budget", ["40%", "macs=40%", {"macs": "40%"}, ["40%"]])
def test_an_amount_alone_is_a_budget_of_macs(supernet, budget):
    (parsed,) = parse_budgets(supernet, budget)
    assert dict(parsed.limits) == {"macs": 0.4 * cost(supernet).macs}
    assert parse_budgets(supernet, parsed) == [parsed]


@pytest.mark.parametrize("text", ["macs<=40% and params<=50%", "macs<=60% and params<=30%"])
def test_the_uniform_network_meets_all_limits(supernet, text):
    budget = make_budget(split_limits(text), cost(supernet))
    widths = find_uniform(Goal(supernet, budget))
    alone = [uniform_at(supernet, metric, limit) for metric, limit in budget.limits]
    assert widths == min(alone, key=lambda w: w.values_)
    assert budget.holds(cost(supernet, widths))


@pytest.mark.parametrize("share", ["100%", "52.3%", "30%"])
def test_the_widest_width_within_a_budget(supernet, share):
    budget = make_budget(split_limits(f"params<={share}"), cost(supernet))
    goal = Goal(supernet, budget)
    start = supernet.space.from_dict({"stem": 7, "inner": 6})
    for name, size in {"stem": 32, "inner": 64}.items():
        fitting = [w for w in range(start[name], size + 1) if budget.holds(cost(supernet, start.replace(name, w)))]
        assert widen(goal, start, name) == start.replace(name, fitting[-1])
        chosen = [w for w in fitting if w in supernet.space[name].choices]
        aligned = start.replace(name, chosen[-1]) if chosen else start
        assert widen(goal, start, name, exact=False) == aligned
    # no group is narrowed, not even where nothing fits
    widest = supernet.space.max()
    assert widen(goal, widest, "stem") == widest


def test_groups_are_filled_in_turn_until_the_budget_is_used_up(supernet):
    goal = Goal(supernet, make_budget(split_limits("macs<=50%"), cost(supernet)))
    start = supernet.space.from_dict({"stem": 4, "inner": 4})
    by_stem, by_inner = (fill(goal, start, names) for names in (["stem", "inner"], ["inner", "stem"]))
    assert by_stem["stem"] == 32
    assert by_inner["inner"] == 64
    for widths, name in ((by_stem, "inner"), (by_inner, "stem")):
        assert goal.holds(widths)
        assert not goal.holds(widths.replace(name, widths[name] + 1))
        assert fill(goal, widths, ["stem", "inner"]) == widths


def test_a_goal_counts_what_its_budget_limits(supernet):
    widths = supernet.space.uniform(0.5)
    goal = Goal(supernet, Budget((("peak_bytes", 1e5),)), Conditions(batch_size=3))
    assert goal.cost(widths) == cost(supernet, widths, batch_size=3)
    assert Goal(supernet, Budget((("macs", 1e5),))).cost(widths) == cost(supernet, widths)


def test_budgets_say_what_the_user_wrote(supernet):
    budgets = parse_budgets(supernet, ["macs <= 90%   and params<= 30%", "macs<=40%"])
    assert [budget.text for budget in budgets] == ["macs<=40%", "macs<=90% and params<=30%"]
    (number,) = parse_budgets(supernet, {"macs": cost(supernet).macs // 2})
    assert number.text == f"macs<={cost(supernet).macs // 2}"
    assert parse_budgets(supernet, [number.text]) == [number]


def test_a_search_keeps_a_budget_of_memory():
    supernet = convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))
    eight = Conditions(batch_size=8)
    widest = cost(supernet, batch_size=8)
    result = search(supernet, ["peak_bytes<=60% and macs<=70%"], lambda subnet: 1.0, conditions=eight)
    spent = result.networks[0].cost
    assert spent == cost(supernet, result.networks[0].widths, batch_size=8)
    assert result.widest == widest
    assert spent.peak_bytes <= 0.6 * widest.peak_bytes
    assert spent.macs <= 0.7 * widest.macs
    assert spent.peak_bytes > 0.57 * widest.peak_bytes or spent.macs > 0.69 * widest.macs
    uniform = uniform_at(supernet, "peak_bytes", "50%", conditions=eight)
    assert 0.45 * widest.peak_bytes < cost(supernet, uniform, batch_size=8).peak_bytes <= 0.5 * widest.peak_bytes
    assert uniform != uniform_at(supernet, "peak_bytes", "50%")


class Attending(nn.Module):
    """Attention whose queries and values narrow apart: where they differ, torch holds the scores of all 256 tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.wide, self.out = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.wide(x).relu().mean(1))


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_a_search_keeps_a_budget_of_memory_that_a_narrower_group_can_exceed(mode):
    supernet = convert(Attending(), torch.zeros(1, 3, 64, 64))
    widest, space = cost(supernet, batch_size=1).peak_bytes, supernet.space
    assert {"q", "v"} <= set(space.names)
    for name in ("q", "v"):  # a step of one alone takes more memory
        narrower = space.max().replace(name, space[name].choices[-2])
        assert cost(supernet, narrower, batch_size=1).peak_bytes > widest
    for budget in ("peak_bytes<=90%", "peak_bytes<=45%", "macs<=50% and peak_bytes<=80%"):
        found = search(
            supernet, [budget], lambda _: sum(1 / w for w in supernet.open_block.values()), mode=mode
        ).networks[0]
        spent = cost(supernet, found.widths, batch_size=1)
        assert all(spent.pick(metric) <= limit for metric, limit in found.limits.items())


def test_a_budget_of_memory_out_of_reach_is_refused():
    supernet = convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))
    with pytest.raises(BudgetError, match="the budget of 1,000 peak_bytes is out of reach: the narrowest"):
        parse_budgets(supernet, ["macs<=50% and peak_bytes<=1k"])


@pytest.mark.parametrize("method", ["search", "uniform", "random"])
def test_a_search_keeps_a_budget_of_latency_and_macs(supernet, monkeypatch, method):
    fake_times(monkeypatch)
    table = LatencyTable()
    widest, conditions = cost(supernet, latency=table), Conditions(latency=table)
    budgets = ["macs<=70% and latency_ms<=80%", f"latency_ms<={0.9 * widest.latency_ms}"]
    if method == "search":
        result = search(supernet, budgets, lambda subnet: 1.0, conditions=conditions)
    else:
        result = baseline(supernet, budgets, lambda subnet: 1.0, method, candidates=3, conditions=conditions)
    first, second = result.networks
    assert first.cost.latency_ms <= 0.9 * widest.latency_ms
    assert second.cost.latency_ms <= 0.8 * widest.latency_ms
    assert second.cost.macs <= 0.7 * widest.macs
    assert second.cost.latency_ms > 0.75 * widest.latency_ms or second.cost.macs > 0.6 * widest.macs


def test_a_budget_of_latency_out_of_reach_is_refused(supernet, monkeypatch):
    fake_times(monkeypatch)
    conditions = Conditions(latency=LatencyTable())
    with pytest.raises(BudgetError, match=r"the budget of 0\.500 latency_ms is out of reach: the narrowest subnet"):
        parse_budgets(supernet, {"latency_ms": 0.5}, conditions=conditions)


def slow_when_narrow(shares):
    """The narrowest subnet is slower than the uniform ones in the middle."""
    return 10 * max(shares) + 8 * (min(shares) < 0.3)


def choose(method, supernet, budget, evaluate, conditions, **more):
    """Search in a mode, or by a baseline."""
    if method in ("fast", "reference"):
        return search(supernet, budget, evaluate, conditions=conditions, mode=method, **more).networks[0]
    few = {"candidates": 4, "population": 2}
    return baseline(supernet, budget, evaluate, method, conditions=conditions, **few).networks[0]


LATENCIES = ["latency_ms<=80%", "latency_ms<=50%", "latency_ms<=60% and macs<=40%"]


@pytest.mark.parametrize("method", ["fast", "reference", "uniform", "random", "importance", "evolutionary"])
@pytest.mark.parametrize("milliseconds", [aligned, in_step, slow_when_narrow])
@pytest.mark.parametrize("budget", slow_but([LATENCIES[-1]], LATENCIES))
def test_a_reachable_budget_is_met_whatever_the_cost_does(branches, method, milliseconds, budget):
    latency = LatencyFunction(milliseconds)
    setting = branches, [budget], charge(branches, a=5, b=1, c=3), Conditions(latency=latency)
    found = choose(method, *setting)
    spent = cost(branches, found.widths, latency=latency)
    assert all(spent.pick(metric) == found.cost.pick(metric) <= limit for metric, limit in found.limits.items())
    if method in ("fast", "reference"):
        rough = choose(method, *setting, refine="none")
        assert all(rough.cost.pick(metric) <= limit for metric, limit in rough.limits.items())
        assert found.loss <= rough.loss
        assert choose(method, *setting) == found


def test_a_budget_that_neither_the_narrowest_nor_a_uniform_subnet_meets_is_refused(branches):
    conditions = Conditions(latency=LatencyFunction(slow_when_narrow))
    evaluate = charge(branches, a=5, b=1, c=3)
    message = (
        r"the budget of 2\.000 latency_ms .* narrowest .* has 9\.250 \(92\.5% .*, and no uniform one holds it; raise"
    )
    with pytest.raises(BudgetError, match=message):
        search(branches, {"latency_ms": 2}, evaluate, conditions=conditions)
    with pytest.raises(BudgetError, match="and no uniform one holds it"):
        uniform_at(branches, "latency_ms", 2, conditions=conditions)
    assert evaluate.calls == 0
    uniform = uniform_at(branches, "latency_ms", 4, conditions=conditions)
    assert max(uniform[n] / SIZES[n] for n in SIZES) <= 0.4


@pytest.mark.parametrize(("amount", "share"), [(0.5, "50%"), (50, "50%"), (1, "100%")])
def test_a_share_in_place_of_a_number_is_told_how_to_write_it(supernet, amount, share):
    with pytest.raises(BudgetError, match=f'out of reach: .*; a share of the widest is written "{share}"; raise'):
        find_subnet(Goal(supernet, make_budget(split_limits(f"macs<={amount}"), cost(supernet))))


@pytest.mark.parametrize(("limit", "text"), [(0.25, "0.25"), (1e-7, "1e-07"), (95823.6, "95,823.6"), (50, "50")])
def test_a_budget_out_of_reach_is_written_with_enough_digits(supernet, limit, text):
    assert cost(supernet, supernet.space.min()).macs == 95824
    with pytest.raises(BudgetError, match=rf"the budget of {re.escape(text)} macs is .* has 95,824 \("):
        find_subnet(Goal(supernet, Budget((("macs", limit),))))


def test_a_budget_keeps_its_text(supernet):
    budget = Budget((("macs", cost(supernet).macs / 2),), "macs<=50%")
    assert [parsed.text for parsed in parse_budgets(supernet, [budget, "macs<=40%"])] == ["macs<=50%", "macs<=40%"]


def test_a_budget_is_checked_too(supernet):
    with pytest.raises(BudgetError, match="a positive number"):
        parse_budgets(supernet, [Budget((("macs", -1.0),))])
