"""The greedy search, on errors whose best answer is known."""

import itertools
import json
import math
import random
from decimal import Decimal

import numpy as np
import pytest
import timm
import torch
from helpers.comparisons import assert_same, snapshot
from helpers.models import TwoGroups, randomise
from helpers.searches import (
    IMAGE,
    SIZES,
    Branches,
    Chain,
    LatencyFunction,
    aligned,
    assert_filled,
    charge,
    draw_budgets,
    few,
    in_step,
    layers,
    width_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from timm_autoslim import Conditions, HeldOut, baseline, convert, cost, search, uniform_at
from timm_autoslim.costs.cost import Cost
from timm_autoslim.errors import BudgetError, ConfigError, EvaluationError, StaleStatisticsError
from timm_autoslim.slimming.budgets import Budget
from timm_autoslim.slimming.descent import _Descent, _FastDescent
from timm_autoslim.slimming.result import Found
from timm_autoslim.slimming.scoring import Scorer


@pytest.fixture
def supernet():
    return convert(randomise(Branches()), IMAGE, min=2, divisor=2)


def evaluate_at(supernet, widths, evaluate):
    """Return the error of a subnet."""
    with supernet.at(widths):
        return evaluate(supernet)


def best(supernet, unit, budget, price):
    """Try all widths."""
    space = supernet.space
    found = []
    for values in itertools.product(*(g.choices for g in space.groups)):
        widths = space.from_dict(dict(zip(space.names, values, strict=True)))
        if getattr(cost(supernet, widths), unit) <= budget:
            found.append(sum(price[n] * (SIZES[n] - widths[n]) for n in SIZES))
    return min(found)


@pytest.mark.parametrize("mode", ["fast", "reference"])
@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("share", ["75%", "50%", "25%"])
@pytest.mark.parametrize("price", [{"a": 5.0, "b": 1.0, "c": 3.0}, {"a": 1.0, "b": 7.0, "c": 0.25}])
def test_where_costs_add_up_greedy_by_cost_is_the_best_there_is(supernet, mode, unit, share, price):
    evaluate = charge(supernet, **price)
    found = search(supernet, {unit: share}, evaluate, mode=mode, steps=100, refine="none").networks[0]
    assert getattr(found.cost, unit) <= found.budget
    assert found.error == pytest.approx(best(supernet, unit, found.budget, price))
    assert found.error == pytest.approx(sum(price[n] * (SIZES[n] - found.widths[n]) for n in SIZES))


def test_ranking_by_error_alone_takes_the_step_that_hurts_least_whatever_it_saves():
    supernet = convert(randomise(Branches()), IMAGE, min=2, divisor={"a": 2, "b": 2, "c": 8})
    price = {
        "a": 1.0,
        "b": 9.0,
        "c": 0.5,
    }  # a step of c costs 4 and saves four times as much as one of a, which costs 2
    by_error = search(supernet, {"macs": "90%"}, charge(supernet, **price), rank="error", steps=100)
    by_cost = search(supernet, {"macs": "90%"}, charge(supernet, **price), rank="per_cost", steps=100)
    assert by_error.steps[0].group == "a"
    assert by_cost.steps[0].group == "c"


def test_one_descent_serves_every_budget_and_each_is_met(supernet):
    price = {"a": 5.0, "b": 1.0, "c": 3.0}
    together = charge(supernet, **price)
    result = search(supernet, {"macs": ["80%", "40%", "60%"]}, together, refine="none")
    whole = cost(supernet).macs
    assert [round(n.budget / whole, 6) for n in result.networks] == [0.8, 0.6, 0.4]
    assert all(0.9 * n.budget < n.cost.macs <= n.budget for n in result.networks)
    assert all(n.cost == cost(supernet, n.widths) for n in result.networks)
    assert result.evaluations == together.calls
    alone = [charge(supernet, **price) for _ in range(3)]
    for share, evaluate in zip(("80%", "60%", "40%"), alone, strict=True):
        search(supernet, {"macs": share}, evaluate, refine="none")
    assert together.calls < sum(evaluate.calls for evaluate in alone)
    for wide, narrow in itertools.pairwise(result.networks):
        assert all(wide.widths[name] >= narrow.widths[name] for name in SIZES)


def test_budgets_in_both_units_are_met_on_the_way_down(supernet):
    result = search(supernet, {"params": ["50%"], "macs": ["70%", "30%"]}, charge(supernet, a=5, b=1, c=3))
    assert [n.unit for n in result.networks] == ["macs", "params", "macs"]
    assert all(getattr(n.cost, n.unit) <= n.budget for n in result.networks)


def path(result):
    return [(step.group, step.width) for step in result.steps]


@pytest.mark.parametrize(
    ("divisor", "unit", "rank"),
    [(None, "macs", "per_cost"), (None, "params", "error"), (1, "macs", "error"), (1, "params", "per_cost")],
)
def test_a_real_network_leaves_little_of_its_budgets_unused(divisor, unit, rank):
    supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32), divisor=divisor)
    groups = supernet.space.groups
    prices = torch.rand(len(groups), generator=torch.Generator().manual_seed(0)).tolist()

    def evaluate(subnet):
        widths = [supernet.model.get_submodule(g.name).weight.shape[0] for g in groups]
        return sum(p * (1 - w / g.size) for p, w, g in zip(prices, widths, groups, strict=True))

    result = search(supernet, {unit: ["70%", "40%", "15%"]}, evaluate, rank=rank, steps=4, refine="none")
    for found in result.networks:
        spent = getattr(found.cost, unit)
        assert (0.9 if divisor is None else 0.98) * found.budget < spent <= found.budget
        # and of the group that was cut last, one step less would have been too little
        last = [step.group for step in result.steps if step.budget == found.budget][-1]
        wider = min(c for c in supernet.space[last].choices if c > found.widths[last])
        assert getattr(cost(supernet, found.widths.replaced(last, wider)), unit) > found.budget
    refined = search(supernet, {unit: ["70%", "40%", "15%"]}, evaluate, rank=rank, steps=4)
    assert path(refined) == path(result)
    for rough, found in zip(result.networks, refined.networks, strict=True):
        assert 0.99 * found.budget <= getattr(found.cost, unit) <= found.budget == rough.budget
        assert found.error <= rough.error


def test_the_trail_tells_the_whole_story(supernet):
    seen = []
    evaluate = charge(supernet, a=5, b=1, c=3)
    result = search(supernet, {"macs": ["60%", "30%"]}, evaluate, on_step=seen.append, refine="none")
    assert tuple(seen) == result.steps
    assert [step.index for step in seen] == list(range(len(seen)))
    widths = supernet.space.max()
    for before, step in zip([None, *seen], seen, strict=False):
        assert step.width < widths[step.group]
        widths = widths.replaced(step.group, step.width)
        assert (step.macs, step.params) == (cost(supernet, widths).macs, cost(supernet, widths).params)
        assert before is None or step.evaluations > before.evaluations
        assert (step.unit, step.limits) == ("macs", {"macs": step.budget})
    assert widths == result.networks[-1].widths
    assert seen[-1].error == result.networks[-1].error
    assert {step.budget for step in seen} == {n.budget for n in result.networks}
    data = json.loads(json.dumps(result.to_dict()))
    assert data == result.to_dict()
    assert supernet.space.from_dict(data["networks"][1]["widths"]) == result.networks[1].widths
    assert data["evaluations"] == result.evaluations == seen[-1].evaluations


def test_more_steps_are_finer_steps(supernet):
    few, many = (search(supernet, {"macs": "30%"}, charge(supernet, a=5, b=1, c=3), steps=n) for n in (2, 100))
    assert len(few.steps) < len(many.steps)
    assert few.evaluations < many.evaluations


def test_the_same_search_finds_the_same(supernet):
    torch.manual_seed(1)
    first = search(supernet, {"macs": ["60%", "30%"]}, charge(supernet, a=2, b=1, c=1))
    torch.manual_seed(2)
    again = convert(randomise(Branches()), IMAGE, min=2, divisor=2)
    assert search(again, {"macs": ["60%", "30%"]}, charge(again, a=2, b=1, c=1)).to_dict() == first.to_dict()


def test_a_budget_above_the_whole_is_the_whole(supernet):
    evaluate = charge(supernet, a=5, b=1, c=3)
    result = search(supernet, {"macs": "100%"}, evaluate)
    assert result.networks[0].widths == supernet.space.max()
    assert result.steps == ()
    assert evaluate.calls == 1


def test_no_subnet_is_scored_twice(supernet):
    seen = []

    def evaluate(subnet):
        seen.append(tuple(supernet.model.get_submodule(name).weight.shape[0] for name in SIZES))
        subnet(IMAGE)
        return float(sum(seen[-1]))

    result = search(supernet, {"macs": "30%"}, evaluate)
    assert len(seen) == len(set(seen)) == result.evaluations
    macs = [cost(supernet, supernet.space.from_dict(dict(zip(SIZES, widths, strict=True)))).macs for widths in seen]
    assert result.evaluated_macs == sum(macs)


def test_scoring_normalises_by_the_batch_runs_without_gradients_and_leaves_no_trace(supernet):
    supernet.train()
    before = snapshot(supernet.model)
    images = torch.randn(8, 3, 8, 8)

    def evaluate(subnet):
        out = subnet(images)
        assert not out.requires_grad
        with torch.no_grad():
            for norm in supernet.model.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    values = norm(100 + 50 * torch.randn(64, norm.weight.shape[0], 4, 4)) - norm.bias[:, None, None]
                    assert values.mean().abs() < 0.05
        return out.square().mean()

    search(supernet, {"macs": "60%"}, evaluate)
    assert_same(before, snapshot(supernet.model))


@few
@given(layers, st.data(), st.sampled_from(["fast", "reference"]))
def test_where_wider_is_better_every_budget_is_filled(layers, data, mode):
    supernet = convert(Chain(layers), IMAGE)
    prices = {g.name: data.draw(st.floats(0.1, 10)) for g in supernet.space.groups}
    units = [{"macs"}, {"params"}, {"macs", "params"}]
    texts = [draw_budgets(supernet, data.draw, u) for u in data.draw(st.lists(st.sampled_from(units), min_size=1))]

    def evaluate(subnet):
        return sum(prices[n] / w for n, w in width_of(supernet).items())

    rough = search(supernet, texts, evaluate, refine="none", mode=mode)
    refined = search(supernet, texts, evaluate, mode=mode)
    assert path(refined) == path(rough)
    for found, before in zip(refined.networks, rough.networks, strict=True):
        assert_filled(supernet, found)
        assert found.error <= before.error
        # only trades make a group narrower
        narrower = [n for n in supernet.space.names if found.widths[n] < before.widths[n]]
        assert mode == "fast" or not narrower
    groups = len(supernet.space)
    trades = 6 * math.ceil(2 * groups / 6) if mode == "fast" else 0
    assert refined.evaluations <= rough.evaluations + len(texts) * (3 * groups + 1 + trades)
    assert search(supernet, texts, evaluate, mode=mode).to_dict() == refined.to_dict()


@few
@given(layers, st.data(), st.integers(0, 1000))
def test_whatever_the_errors_refining_never_raises_them(layers, data, seed):
    supernet = convert(Chain(layers), IMAGE)
    texts = [draw_budgets(supernet, data.draw, {"macs"}), draw_budgets(supernet, data.draw, {"macs", "params"})]

    def evaluate(subnet):
        return random.Random(f"{seed} {width_of(supernet)}").random()

    rough, refined = (search(supernet, texts, evaluate, refine=refine) for refine in ("none", "units"))
    assert path(refined) == path(rough)
    for found, before in zip(refined.networks, rough.networks, strict=True):
        assert all(getattr(found.cost, unit) <= limit for unit, limit in found.limits.items())
        assert found.error <= before.error


@few
@given(layers, st.integers(2, 4), st.data(), st.sampled_from(["fast", "reference"]))
def test_refined_on_the_choices_no_width_leaves_them(layers, divisor, data, mode):
    supernet = convert(Chain(layers), IMAGE, divisor=divisor)
    space = supernet.space
    texts = [draw_budgets(supernet, data.draw, {"macs"}), draw_budgets(supernet, data.draw, {"macs", "params"})]
    rough, aligned, refined = (
        search(supernet, texts, lambda _: -sum(width_of(supernet).values()), refine=r, mode=mode)
        for r in ("none", "choices", "units")
    )
    assert path(aligned) == path(rough)
    for before, found, filled in zip(rough.networks, aligned.networks, refined.networks, strict=True):
        limits = Budget(tuple(found.limits.items()))
        assert limits.holds(found.cost)
        assert found.error <= before.error
        assert all(found.widths[g.name] in g.choices for g in space.groups)
        if limits.used(found.cost) >= 0.99:
            # single units come only after the choices, but a trade may have needed some
            assert mode == "fast" or filled == found
            continue
        for group in space.groups:
            for wider in [c for c in group.choices if c > found.widths[group.name]][:1]:
                assert not limits.holds(cost(supernet, found.widths.replaced(group.name, wider))), group.name


def test_where_wider_is_worse_the_descent_is_not_refined(supernet):
    def evaluate(subnet):
        return sum(width_of(supernet).values())

    # 45 of the 64 channels, of which one alone cannot be cut
    rough, refined = (
        search(supernet, {"macs": "70.4%"}, evaluate, refine=r, mode="reference") for r in ("none", "units")
    )
    assert rough.networks[0].cost.macs < 0.99 * rough.networks[0].budget
    assert refined.networks == rough.networks
    assert refined.evaluations == rough.evaluations + sum(w < SIZES[n] for n, w in rough.networks[0].widths.items())


def test_trades_take_steps_back(supernet):
    """From widths that no single widening can mend, the dear group is widened and a cheap one narrowed."""
    evaluate = charge(supernet, a=9.0, b=1.0, c=0.1)
    order = dict(zip(supernet.space.names, range(3), strict=True))
    descent = _FastDescent(supernet, Scorer(supernet, evaluate), "per_cost", 4, order)
    descent.widths = supernet.space.from_dict({"a": 4, "b": 8, "c": 32})
    budget = Budget((("macs", float(cost(supernet, descent.widths).macs)),))
    assert _Descent.refined(descent, budget, "units") == descent.widths
    found = descent.refined(budget, "units")
    assert budget.holds(cost(supernet, found))
    assert found["a"] > 4
    assert evaluate_at(supernet, found, evaluate) < evaluate_at(supernet, descent.widths, evaluate)
    assert descent.refined(budget, "units") == found  # the same draws again


def test_the_refinement_widens_the_group_that_helps_most(supernet):
    # 13 of the 64 channels, all of which cost the same
    rough, refined = (
        search(supernet, {"macs": "20.4%"}, charge(supernet, a=1.0, b=1.1, c=9.0), refine=r).networks[0]
        for r in ("none", "units")
    )
    assert rough.widths.to_dict() == {"a": 2, "b": 2, "c": 8}
    assert refined.widths.to_dict() == {"a": 2, "b": 2, "c": 9}


def test_all_limits_of_a_budget_hold_and_are_recorded(supernet):
    whole = cost(supernet)
    texts = ["params<=90% and macs<=50%", "macs<=80%", "macs<=75% and params<=40%"]
    result = search(supernet, texts, charge(supernet, a=5, b=1, c=3))
    # in the order of the descent: by the limit that is the smallest share
    assert [n.limits for n in result.networks] == [
        {"macs": 0.8 * whole.macs},
        {"params": 0.9 * whole.params, "macs": 0.5 * whole.macs},
        {"macs": 0.75 * whole.macs, "params": 0.4 * whole.params},
    ]
    assert [(n.unit, n.budget) for n in result.networks] == [
        ("macs", 0.8 * whole.macs),
        ("macs", 0.5 * whole.macs),
        ("params", 0.4 * whole.params),
    ]
    for found in result.networks:
        assert_filled(supernet, found)
    assert [s.limits for s in result.steps if s.unit == "params"] == [
        result.networks[2].limits for s in result.steps if s.unit == "params"
    ]
    assert result.steps[-1].unit == "params"
    data = json.loads(json.dumps(result.to_dict()))
    assert data == result.to_dict()
    assert data["networks"][2]["limits"] == result.networks[2].limits


def test_a_limit_that_binds_nothing_changes_nothing(supernet):
    one = search(supernet, {"macs": "50%"}, charge(supernet, a=5, b=1, c=3))
    both = search(supernet, ["macs<=50% and params<=100%"], charge(supernet, a=5, b=1, c=3))
    assert both.networks[0].widths == one.networks[0].widths
    assert path(both) == path(one)


def test_a_list_of_texts_says_what_a_dict_says(supernet):
    texts = search(supernet, ["macs<=30%", "macs <= 60%"], charge(supernet, a=5, b=1, c=3))
    assert texts == search(supernet, {"macs": ["60%", "30%"]}, charge(supernet, a=5, b=1, c=3))


# -- the two modes, and ties ------------------------------------------------------------------------------------------


def in_parts(supernet, prices, parts=16):
    """Return an evaluate in parts: what narrow groups cost grows as they narrow, and a little with the part."""

    def score(subnet, part):
        subnet(IMAGE)
        widths = width_of(supernet)
        return sum(p * (1 + 0.2 * ((i + part) % 3)) / widths[n] for i, (n, p) in enumerate(prices.items()))

    return HeldOut(range(parts), score)


def test_the_reference_scores_every_group_at_every_step_on_all_images():
    supernet = convert(Chain([(40, False)] * 6), IMAGE)
    seen = []
    evaluate = in_parts(supernet, dict.fromkeys(supernet.space.names, 1.0), parts=2)
    whole = HeldOut(evaluate.batches, lambda s, part: (seen.append(width_of(supernet)), evaluate.score(s, part))[1])
    result = search(supernet, {"macs": "60%"}, whole, mode="reference", rank="error", refine="none")
    widths, scored = supernet.space.max(), {supernet.space.max()}
    for step in result.steps:
        groups = supernet.space.groups
        now = {widths.replaced(g.name, max(c for c in g.choices if c < widths[g.name])) for g in groups}
        scored |= now
        widths = widths.replaced(step.group, step.width)
        assert widths in now
    assert {supernet.space.from_dict(w) for w in seen} == scored
    assert len(seen) == 2 * len(scored) == 2 * result.evaluations


def test_the_fast_mode_is_ten_times_cheaper_and_as_good():
    supernet = convert(Chain([(24, False)] * 12), IMAGE)
    draw = random.Random(0)
    evaluate = in_parts(supernet, {n: draw.uniform(0.5, 5) for n in supernet.space.names}, parts=6)
    budgets = {"macs": ["75%", "50%"]}
    slow, fast = (search(supernet, budgets, evaluate, mode=mode) for mode in ("reference", "fast"))
    assert 10 * fast.evaluated_macs < slow.evaluated_macs
    assert 3 * fast.evaluations < slow.evaluations
    for one, other in zip(fast.networks, slow.networks, strict=True):
        assert one.error <= 1.01 * other.error
        assert 0.99 * one.budget <= one.cost.macs <= one.budget


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_ties_are_decided_by_the_seed(mode):
    supernet = convert(Chain([(32, False)] * 6), IMAGE)

    def found(seed):
        return search(supernet, {"macs": "50%"}, lambda subnet: 1.0, mode=mode, seed=seed, rank="error").to_dict()

    assert found(3) == found(3)
    assert len({json.dumps(found(seed)["steps"][:3]) for seed in range(6)}) > 1


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
    supernet.conditions = Conditions(latency=LatencyFunction(milliseconds))
    evaluate = charge(supernet, a=5, b=1, c=3)
    found = choose(method, supernet, [budget], evaluate)
    spent = cost(supernet, found.widths)
    assert all(getattr(spent, unit) == getattr(found.cost, unit) <= limit for unit, limit in found.limits.items())
    if method in ("fast", "reference"):
        rough = choose(method, supernet, [budget], evaluate, refine="none")
        assert all(getattr(rough.cost, unit) <= limit for unit, limit in rough.limits.items())
        assert found.error <= rough.error
        assert choose(method, supernet, [budget], evaluate) == found


def test_a_budget_that_neither_the_narrowest_nor_a_uniform_subnet_meets_is_refused(supernet):
    supernet.conditions = Conditions(latency=LatencyFunction(slow_when_narrow))
    evaluate = charge(supernet, a=5, b=1, c=3)
    message = (
        r"the budget of 2\.000 latency_ms .* narrowest .* has 9\.250 \(92\.5% .*, and no uniform one holds it; raise"
    )
    with pytest.raises(BudgetError, match=message):
        search(supernet, {"latency_ms": 2}, evaluate)
    with pytest.raises(BudgetError, match="and no uniform one holds it"):
        uniform_at(supernet, "latency_ms", 2)
    assert evaluate.calls == 0
    assert max(uniform_at(supernet, "latency_ms", 4)[n] / SIZES[n] for n in SIZES) <= 0.4


def test_a_network_over_budget_is_never_returned(supernet):
    budget, widths = Budget((("macs", 100.0), ("params", 10.0))), supernet.space.max()
    assert Found.of(budget, widths, Cost(100, 9), 0.5).limits == {"macs": 100.0, "params": 10.0}
    with pytest.raises(BudgetError, match=r"network found costs 101 macs where it cost at most 100\.0 before"):
        Found.of(budget, widths, Cost(101, 9), 0.5)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (
            {"macs": "0.1%"},
            r"the budget of [\d,]+ macs is out of reach: the narrowest subnet of the search space has [\d,]+ \(",
        ),
        ({"macs": ["50%", 10]}, r"the budget of 10 macs is out of reach"),
        ({"params": "3%"}, r"the budget of [\d,]+ params is out of reach"),
        ({"macs": "half"}, r"got the budget 'half'; needed: a number"),
        ({"macs": -1}, r"got the budget -1; needed: a positive number"),
        ({"flops": "50%"}, r"got a budget in 'flops'; needed: one of \['macs', 'params', 'peak_bytes', 'latency_ms'\]"),
        ({"macs": None}, "got the budget None; needed: a number"),
        ({"macs": Decimal(5)}, r"got the budget Decimal\('5'\); needed: a number"),
        ({"macs": torch.tensor(5)}, r"got the budget tensor\(5\); needed: a number"),
        ({"macs": True}, "got the budget True; needed: a number"),
        ({"macs": 10**400}, "got the budget 1000.*; needed: a positive number"),
        ({"macs": np.int64(5)}, "the budget of 5 macs is out of reach"),
        (None, "got the budgets None; needed: a dict"),
        ({"macs": []}, r"got no budget; needed: at least one number"),
        ({}, r'got the budgets \{\}; needed: a dict such as \{"macs": \["60%", "300M"\]\}'),
        ("50%", r"got the budgets '50%'; needed: a dict"),
        ("macs<=50%", r'got the budgets .macs<=50%.; .*, or a list such as \["macs<=300M and params<=2M"\]'),
        ([], r"got the budgets \[\]; needed: a dict"),
        (["50%"], r"got the budget '50%'; needed: a text of UNIT<=AMOUNT joined by `and`"),
        ([0.5], r"got the budget 0.5; needed: a text of UNIT<=AMOUNT"),
        (["macs<=50% and params<=1%"], r"the budget of [\d,]+ params is out of reach"),
        (["params<=50% and macs<=10"], r"the budget of 10 macs is out of reach"),
    ],
)
def test_budgets_are_refused_before_anything_is_evaluated(supernet, budgets, message):
    evaluate = charge(supernet, a=5, b=1, c=3)
    with pytest.raises(BudgetError, match=message):
        search(supernet, budgets, evaluate)
    assert evaluate.calls == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "slow"}, r"got mode='slow'; needed: one of \['fast', 'reference'\]"),
        ({"rank": "loss"}, r"got rank='loss'; needed: one of \['error', 'per_cost'\]"),
        ({"steps": 0}, "steps: got 0; needed: a positive integer or None"),
        ({"steps": 2.5}, r"steps: got 2\.5; needed: a positive integer or None"),
        ({"steps": True}, "steps: got True; needed: a positive integer or None"),
        ({"seed": None}, "seed: got None; needed: an integer from"),
        ({"seed": 2**70}, r"seed: got \d+; needed: an integer from"),
        ({"scores": []}, "got scores of type list; needed: a dict, or None"),
        ({"on_step": 5}, "got on_step=5; needed: a callable that takes a Step, or None"),
        ({"team": 2}, "got team=2; needed: a Team, or None"),
    ],
)
def test_other_arguments_are_refused_before_anything_is_evaluated(supernet, given, message):
    evaluate = charge(supernet, a=5, b=1, c=3)
    with pytest.raises(ConfigError, match=message):
        search(supernet, {"macs": "50%"}, evaluate, **given)
    assert evaluate.calls == 0


def test_a_plain_model_is_told_to_be_converted(supernet):
    calls = [
        lambda model: search(model, {"macs": "50%"}, lambda subnet: 1.0),
        lambda model: baseline(model, {"macs": "50%"}, lambda subnet: 1.0, "uniform"),
        lambda model: uniform_at(model, "macs", "50%"),
        cost,
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"got a Branches; needed: a Supernet, as convert\(model\) returns"):
            call(supernet.model)


def raising(subnet):
    raise ZeroDivisionError("no images")


class Late:
    """An evaluate that fails at its fourth call."""

    calls = 0

    def __call__(self, subnet):
        self.calls += 1
        return float("nan") if self.calls == 4 else 1.0


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (
            lambda subnet: float("nan"),
            r"evaluate returned nan; needed: a finite error or loss; at the widths \{'a': 16, 'b': 16,",
        ),
        (lambda subnet: torch.tensor(float("inf")), r"evaluate returned inf; needed: a finite error or loss"),
        (Late(), r"evaluate returned nan; .*at the widths \{'a': \d+, 'b': \d+, 'c': \d+\}"),
        (raising, r"evaluate raised ZeroDivisionError: no images; at the widths \{'a': 16, 'b': 16, 'c': 32\}"),
        (lambda subnet: "low", r"evaluate raised ValueError: could not convert string to float: 'low'; at the widths"),
        (lambda subnet: None, r"evaluate raised TypeError: .*; at the widths"),
    ],
)
def test_an_evaluate_that_fails_is_told_with_the_widths_and_leaves_the_supernet_whole(supernet, evaluate, message):
    before = snapshot(supernet.model)
    with pytest.raises(EvaluationError, match=message):
        search(supernet, {"macs": "50%"}, evaluate)
    assert_same(before, snapshot(supernet.model))
    assert supernet._held is None


@pytest.mark.parametrize("to_eval", [lambda s: s.eval(), lambda s: s.model.a_bn.eval()], ids=["all", "one"])
def test_statistics_of_another_network_are_never_scored(supernet, to_eval):
    before = snapshot(supernet.model)

    def evaluate(subnet):
        to_eval(subnet)
        return subnet(IMAGE).square().mean()

    with pytest.raises(
        StaleStatisticsError, match=r"a_bn: .*BatchNorm in evaluation mode.* [dD]o not call \.?eval\(\)"
    ):
        search(supernet, {"macs": "50%"}, evaluate)
    assert_same(before, snapshot(supernet.model))


def test_a_search_inside_a_block_is_refused(supernet):
    with supernet.at(supernet.space.min()), pytest.raises(ValueError, match=r"block is open already"):
        search(supernet, {"macs": "50%"}, charge(supernet, a=5, b=1, c=3))


def test_plain_searches_too():
    supernet = convert(TwoGroups(32), IMAGE)
    found = search(supernet, {"params": "40%"}, lambda subnet: subnet(torch.ones(4, 3, 8, 8)).std()).networks[0]
    assert found.cost.params <= found.budget
