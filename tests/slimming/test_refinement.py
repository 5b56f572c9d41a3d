"""What a descent leaves of a budget is filled, and width is traded between groups."""

import math
import random

import pytest
from helpers.searches import IMAGE, SIZES, Branches, Chain, assert_filled, charge, draw_budgets, few, layers, width_of
from helpers.zoo import randomise
from hypothesis import given
from hypothesis import strategies as st

from timm_autoslim import REFINEMENTS, Budget, convert, cost, search
from timm_autoslim.slimming.descent import Descent, FastDescent
from timm_autoslim.slimming.goals import Goal
from timm_autoslim.slimming.scoring import Scorer


@pytest.fixture
def supernet():
    return convert(randomise(Branches()), IMAGE, min=2, divisor=2)


def evaluate_at(supernet, widths, evaluate):
    """Return the loss of a subnet."""
    with supernet.at(widths):
        return evaluate(supernet)


def path(result):
    return [(step.group, step.width) for step in result.steps]


@pytest.mark.slow
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
    for network, before in zip(refined.networks, rough.networks, strict=True):
        assert_filled(supernet, network)
        assert network.loss <= before.loss
        # only trades make a group narrower
        narrower = [n for n in supernet.space.names if network.widths[n] < before.widths[n]]
        assert mode == "fast" or not narrower
    groups = len(supernet.space)
    trades = 6 * math.ceil(2 * groups / 6) if mode == "fast" else 0
    assert refined.evaluations <= rough.evaluations + len(texts) * (3 * groups + 1 + trades)
    assert search(supernet, texts, evaluate, mode=mode).to_dict() == refined.to_dict()


@pytest.mark.slow
@few
@given(layers, st.data(), st.integers(0, 1000))
def test_whatever_the_losses_refining_never_raises_them(layers, data, seed):
    supernet = convert(Chain(layers), IMAGE)
    texts = [draw_budgets(supernet, data.draw, {"macs"}), draw_budgets(supernet, data.draw, {"macs", "params"})]

    def evaluate(subnet):
        return random.Random(f"{seed} {width_of(supernet)}").random()

    rough, refined = (search(supernet, texts, evaluate, refine=refine) for refine in ("none", "units"))
    assert path(refined) == path(rough)
    for network, before in zip(refined.networks, rough.networks, strict=True):
        assert all(network.cost.pick(metric) <= limit for metric, limit in network.limits.items())
        assert network.loss <= before.loss


@pytest.mark.slow
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
    for before, network, filled in zip(rough.networks, aligned.networks, refined.networks, strict=True):
        limits = Budget(tuple(network.limits.items()))
        assert limits.holds(network.cost)
        assert network.loss <= before.loss
        assert all(network.widths[g.name] in g.choices for g in space.groups)
        if limits.used(network.cost) >= 0.99:
            # single units come only after the choices, but a trade may have needed some
            assert mode == "fast" or filled == network
            continue
        for group in space.groups:
            for wider in [c for c in group.choices if c > network.widths[group.name]][:1]:
                assert not limits.holds(cost(supernet, network.widths.replace(group.name, wider))), group.name


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
    descent = FastDescent(supernet, Scorer(supernet, evaluate), "per_cost", 4, order)
    descent.widths = supernet.space.from_dict({"a": 4, "b": 8, "c": 32})
    goal = Goal(supernet, Budget((("macs", float(cost(supernet, descent.widths).macs)),)))
    passes = REFINEMENTS["units"]
    assert Descent.refine(descent, goal, passes) == descent.widths
    widths = descent.refine(goal, passes)
    assert goal.holds(widths)
    assert widths["a"] > 4
    assert evaluate_at(supernet, widths, evaluate) < evaluate_at(supernet, descent.widths, evaluate)
    assert descent.refine(goal, passes) == widths  # the same draws again


def test_the_refinement_widens_the_group_that_helps_most(supernet):
    # 13 of the 64 channels, all of which cost the same
    rough, refined = (
        search(supernet, {"macs": "20.4%"}, charge(supernet, a=1.0, b=1.1, c=9.0), refine=r).networks[0]
        for r in ("none", "units")
    )
    assert rough.widths.to_dict() == {"a": 2, "b": 2, "c": 8}
    assert refined.widths.to_dict() == {"a": 2, "b": 2, "c": 9}
