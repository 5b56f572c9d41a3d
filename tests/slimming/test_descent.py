"""The descent, on losses whose best answer is known, in both modes."""

import itertools
import json
import random

import pytest
from helpers.marks import slow_but
from helpers.searches import IMAGE, SIZES, Branches, Chain, charge, width_of
from helpers.zoo import randomise

from timm_autoslim import HeldOut, convert, cost, search
from timm_autoslim.slimming.descent import FastDescent


@pytest.fixture
def supernet():
    return convert(randomise(Branches()), IMAGE, min=2, divisor=2)


def best(supernet, metric, budget, price):
    """Try all widths."""
    space = supernet.space
    found = []
    for values in itertools.product(*(g.choices for g in space.groups)):
        widths = space.from_dict(dict(zip(space.names, values, strict=True)))
        if cost(supernet, widths).pick(metric) <= budget:
            found.append(sum(price[n] * (SIZES[n] - widths[n]) for n in SIZES))
    return min(found)


@pytest.mark.parametrize("mode", ["fast", "reference"])
@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("share", slow_but(["25%"], ["75%", "50%", "25%"]))
@pytest.mark.parametrize("price", [{"a": 5.0, "b": 1.0, "c": 3.0}, {"a": 1.0, "b": 7.0, "c": 0.25}])
def test_where_costs_add_up_greedy_by_cost_is_the_best_there_is(supernet, mode, metric, share, price):
    evaluate = charge(supernet, **price)
    found = search(supernet, {metric: share}, evaluate, mode=mode, steps=100, refine="none").networks[0]
    assert found.cost.pick(metric) <= found.budget
    assert found.loss == pytest.approx(best(supernet, metric, found.budget, price))
    assert found.loss == pytest.approx(sum(price[n] * (SIZES[n] - found.widths[n]) for n in SIZES))


def test_a_group_that_was_scored_before_is_scored_again_only_if_it_promises_most(supernet):
    evaluate = charge(supernet, a=5.0, b=1.0, c=3.0)  # a step raises the loss as the last one of its group did
    steps = search(supernet, {"macs": "40%"}, evaluate, steps=100, refine="none").steps
    scored = [after.evaluations - before.evaluations for before, after in itertools.pairwise(steps)]
    assert len(scored) > 5
    assert max(scored) <= FastDescent.LOOK


def test_ranking_by_loss_alone_takes_the_step_that_hurts_least_whatever_it_saves():
    supernet = convert(randomise(Branches()), IMAGE, min=2, divisor={"a": 2, "b": 2, "c": 8})
    price = {
        "a": 1.0,
        "b": 9.0,
        "c": 0.5,
    }  # a step of c costs 4 and saves four times as much as one of a, which costs 2
    by_loss = search(supernet, {"macs": "90%"}, charge(supernet, **price), rank="loss", steps=100)
    by_cost = search(supernet, {"macs": "90%"}, charge(supernet, **price), rank="per_cost", steps=100)
    assert by_loss.steps[0].group == "a"
    assert by_cost.steps[0].group == "c"


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
    result = search(supernet, {"macs": "60%"}, whole, mode="reference", rank="loss", refine="none")
    seen.remove(dict(supernet.space.min()))  # on one part, for the direction of the loss
    widths, scored = supernet.space.max(), {supernet.space.max()}
    for step in result.steps:
        groups = supernet.space.groups
        now = {widths.replace(g.name, max(c for c in g.choices if c < widths[g.name])) for g in groups}
        scored |= now
        widths = widths.replace(step.group, step.width)
        assert widths in now
    assert {supernet.space.from_dict(w) for w in seen} == scored
    assert len(seen) == 2 * len(scored) == 2 * (result.evaluations - 1)


@pytest.mark.slow
def test_the_fast_mode_is_ten_times_cheaper_and_as_good():
    supernet = convert(Chain([(24, False)] * 12), IMAGE)
    draw = random.Random(0)
    evaluate = in_parts(supernet, {n: draw.uniform(0.5, 5) for n in supernet.space.names}, parts=6)
    budgets = {"macs": ["75%", "50%"]}
    slow, fast = (search(supernet, budgets, evaluate, mode=mode) for mode in ("reference", "fast"))
    assert 10 * fast.evaluated_macs < slow.evaluated_macs
    assert 3 * fast.evaluations < slow.evaluations
    for one, other in zip(fast.networks, slow.networks, strict=True):
        assert one.loss <= 1.01 * other.loss
        assert 0.99 * one.budget <= one.cost.macs <= one.budget


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_ties_are_decided_by_the_seed(mode):
    supernet = convert(Chain([(32, False)] * 6), IMAGE)

    def found(seed):
        return search(supernet, {"macs": "50%"}, lambda subnet: 1.0, mode=mode, seed=seed, rank="loss").to_dict()

    assert found(3) == found(3)
    assert len({json.dumps(found(seed)["steps"][:3]) for seed in range(6)}) > 1


def test_more_steps_are_finer_steps(supernet):
    few, many = (search(supernet, {"macs": "30%"}, charge(supernet, a=5, b=1, c=3), steps=n) for n in (2, 100))
    assert len(few.steps) < len(many.steps)
    assert few.evaluations < many.evaluations
