"""Widths within a budget, whatever the metric does as groups narrow."""

import pytest
import torch
from helpers.latencies import fake_times
from helpers.searches import SIZES, Said, aligned, in_step, missing
from helpers.zoo import Plain
from torch import nn

from timm_autoslim import Budget, Conditions, LatencyTable, baseline, convert, cost, parse_budgets, search, uniform_at
from timm_autoslim.errors import BudgetError
from timm_autoslim.slimming.budgets import parse_amount, parse_limits


@pytest.fixture(scope="module")
def supernet():
    return convert(Plain(32), torch.zeros(1, 3, 8, 8))


def test_a_budget_out_of_reach_is_refused_with_what_the_narrowest_reaches(supernet):
    narrowest = cost(supernet, supernet.space.min())
    assert within_reach(supernet, Budget((("macs", narrowest.macs),))) == supernet.space.min()
    message = (
        rf"the budget of {narrowest.params - 1:,} params is out of reach: the narrowest subnet of the search space has "
        rf"{narrowest.params:,} \(\d+\.\d% of the whole\); raise the budget, or lower `min` in convert\(\)"
    )
    with pytest.raises(BudgetError, match=message):
        within_reach(supernet, Budget((("params", narrowest.params - 1),)))
    with pytest.raises(BudgetError, match="out of reach"):
        uniform_at(supernet, "params", narrowest.params - 1)


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("budget", ["95%", "50%", "25%", "12%"])
def test_uniform_at_is_the_widest_uniform_network_within_the_budget(supernet, metric, budget):
    space, whole = supernet.space, cost(supernet)
    number = parse_amount(budget, getattr(whole, metric))
    widths = uniform_at(supernet, metric, budget)
    assert getattr(cost(supernet, widths), metric) <= number
    ratios = [i / 640 for i in range(1, 641)]
    within = [w for w in (space.uniform(r, exact=True) for r in ratios) if getattr(cost(supernet, w), metric) <= number]
    assert cost(supernet, widths).macs == max(cost(supernet, w).macs for w in within)
    assert abs(widths["stem"] / 32 - widths["inner"] / 64) <= 1 / 32


def test_uniform_at_of_the_whole_and_of_more_is_the_whole(supernet):
    assert uniform_at(supernet, "macs", "100%") == supernet.space.max()
    assert uniform_at(supernet, "params", 1e12) == supernet.space.max()


def test_uniform_at_refuses_malformed_budgets(supernet):
    with pytest.raises(BudgetError, match="got a budget in 'latency'"):
        uniform_at(supernet, "latency", "50%")
    with pytest.raises(BudgetError, match="got the budget 'half'"):
        uniform_at(supernet, "macs", "half")


def test_budgets_come_in_the_order_of_a_descent(supernet):
    whole = cost(supernet)
    found = parse_budgets(supernet, ["macs<=90% and params<=30%", "macs<=40%", "params<=60%"])
    assert [dict(b.limits) for b in found] == [
        {"params": 0.6 * whole.params},
        {"macs": 0.4 * whole.macs},
        {"macs": 0.9 * whole.macs, "params": 0.3 * whole.params},
    ]


@pytest.mark.parametrize("text", ["macs<=40% and params<=50%", "macs<=60% and params<=30%"])
def test_the_uniform_network_meets_all_limits(supernet, text):
    budget = parse_limits(text, cost(supernet))
    widths = uniform_within(supernet, budget)
    alone = [uniform_at(supernet, metric, limit) for metric, limit in budget.limits]
    assert widths == min(alone, key=lambda w: w.values_)
    assert budget.holds(cost(supernet, widths))


@pytest.mark.parametrize("share", ["100%", "52.3%", "30%"])
def test_the_widest_width_within_a_budget(supernet, share):
    budget = parse_limits(f"params<={share}", cost(supernet))
    start = supernet.space.from_dict({"stem": 7, "inner": 6})
    for name, size in {"stem": 32, "inner": 64}.items():
        fitting = [w for w in range(start[name], size + 1) if budget.holds(cost(supernet, start.replaced(name, w)))]
        assert widest_within(supernet, start, name, budget) == start.replaced(name, fitting[-1])
        chosen = [w for w in fitting if w in supernet.space[name].choices]
        aligned = start.replaced(name, chosen[-1]) if chosen else start
        assert widest_within(supernet, start, name, budget, exact=False) == aligned
    # no group is narrowed, not even where nothing fits
    whole = supernet.space.max()
    assert widest_within(supernet, whole, "stem", budget) == whole


def test_a_search_keeps_a_budget_of_memory():
    supernet = convert(Plain(32), torch.zeros(1, 3, 8, 8))
    supernet.conditions = Conditions(batch_size=8)
    whole = cost(supernet)
    found = search(supernet, ["peak_bytes<=60% and macs<=70%"], lambda subnet: 1.0).networks[0]
    assert found.cost.peak_bytes <= 0.6 * whole.peak_bytes
    assert found.cost.macs <= 0.7 * whole.macs
    assert found.cost.peak_bytes > 0.57 * whole.peak_bytes or found.cost.macs > 0.69 * whole.macs
    uniform = uniform_at(supernet, "peak_bytes", "50%")
    assert 0.45 * whole.peak_bytes < cost(supernet, uniform).peak_bytes <= 0.5 * whole.peak_bytes


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
    whole, space = cost(supernet).peak_bytes, supernet.space
    assert {"q", "v"} <= set(space.names)
    for name in ("q", "v"):  # a step of one alone takes more memory
        assert cost(supernet, space.max().replaced(name, space[name].choices[-2])).peak_bytes > whole
    for budget in ("peak_bytes<=90%", "peak_bytes<=45%", "macs<=50% and peak_bytes<=80%"):
        found = search(supernet, [budget], lambda _: sum(1 / w for w in supernet._held.values()), mode=mode).networks[0]
        assert all(getattr(cost(supernet, found.widths), metric) <= limit for metric, limit in found.limits.items())


def test_a_budget_of_memory_out_of_reach_is_refused():
    supernet = convert(Plain(32), torch.zeros(1, 3, 8, 8))
    with pytest.raises(BudgetError, match="the budget of 1,000 peak_bytes is out of reach: the narrowest"):
        parse_budgets(supernet, ["macs<=50% and peak_bytes<=1k"])


@pytest.mark.parametrize("method", ["search", "uniform", "random"])
def test_a_search_keeps_a_budget_of_latency_and_macs(supernet, monkeypatch, method):
    fake_times(monkeypatch)
    supernet.conditions = Conditions(latency=LatencyTable())
    whole = cost(supernet)
    budgets = ["macs<=70% and latency_ms<=80%", f"latency_ms<={0.9 * whole.latency_ms}"]
    if method == "search":
        result = search(supernet, budgets, lambda subnet: 1.0)
    else:
        result = baseline(supernet, budgets, lambda subnet: 1.0, method, candidates=3)
    first, second = result.networks
    assert first.cost.latency_ms <= 0.9 * whole.latency_ms
    assert second.cost.latency_ms <= 0.8 * whole.latency_ms
    assert second.cost.macs <= 0.7 * whole.macs
    assert second.cost.latency_ms > 0.75 * whole.latency_ms or second.cost.macs > 0.6 * whole.macs


def test_a_budget_of_latency_out_of_reach_is_refused(supernet, monkeypatch):
    fake_times(monkeypatch)
    supernet.conditions = Conditions(latency=LatencyTable())
    with pytest.raises(BudgetError, match=r"the budget of 0\.500 latency_ms is out of reach: the narrowest subnet"):
        parse_budgets(supernet, {"latency_ms": 0.5})


def slow_when_narrow(shares):
    """The narrowest subnet is slower than the uniform ones in the middle."""
    return 10 * max(shares) + 8 * (min(shares) < 0.3)


def choose(method, supernet, budget, evaluate, **more):
    """Search in a mode, or by a baseline."""
    if method in ("fast", "reference"):
        return search(supernet, budget, evaluate, mode=method, **more).networks[0]
    return baseline(supernet, budget, evaluate, method, candidates=4, population=2).networks[0]


@pytest.mark.parametrize("method", ["fast", "reference", "uniform", "random", "importance", "evolutionary"])
@pytest.mark.parametrize("milliseconds", [aligned, in_step, slow_when_narrow])
@pytest.mark.parametrize("budget", ["latency_ms<=80%", "latency_ms<=50%", "latency_ms<=60% and macs<=40%"])
def test_a_reachable_budget_is_met_whatever_the_cost_does(supernet, method, milliseconds, budget):
    supernet.conditions = Conditions(latency=Said(milliseconds))
    evaluate = missing(supernet, a=5, b=1, c=3)
    found = choose(method, supernet, [budget], evaluate)
    spent = cost(supernet, found.widths)
    assert all(getattr(spent, metric) == getattr(found.cost, metric) <= limit for metric, limit in found.limits.items())
    if method in ("fast", "reference"):
        rough = choose(method, supernet, [budget], evaluate, refine="none")
        assert all(getattr(rough.cost, metric) <= limit for metric, limit in rough.limits.items())
        assert found.loss <= rough.loss
        assert choose(method, supernet, [budget], evaluate) == found


def test_a_budget_that_neither_the_narrowest_nor_a_uniform_subnet_meets_is_refused(supernet):
    supernet.conditions = Conditions(latency=Said(slow_when_narrow))
    evaluate = missing(supernet, a=5, b=1, c=3)
    message = (
        r"the budget of 2\.000 latency_ms .* narrowest .* has 9\.250 \(92\.5% .*, and no uniform one holds it; raise"
    )
    with pytest.raises(BudgetError, match=message):
        search(supernet, {"latency_ms": 2}, evaluate)
    with pytest.raises(BudgetError, match="and no uniform one holds it"):
        uniform_at(supernet, "latency_ms", 2)
    assert evaluate.calls == 0
    assert max(uniform_at(supernet, "latency_ms", 4)[n] / SIZES[n] for n in SIZES) <= 0.4
