"""The greedy search as a whole: budgets, steps, scoring, and what is refused."""

import itertools
import json
from decimal import Decimal

import numpy as np
import pytest
import timm
import torch
from helpers.comparisons import assert_same, snapshot
from helpers.models import TwoGroups, randomise
from helpers.searches import IMAGE, SIZES, Branches, assert_filled, charge, width_of
from torch import nn

from timm_autoslim import baseline, convert, cost, search, uniform_at
from timm_autoslim.errors import BudgetError, ConfigError, EvaluationError, StaleStatisticsError


@pytest.fixture
def supernet():
    return convert(randomise(Branches()), IMAGE, min=2, divisor=2)


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


def test_budgets_in_both_metrics_are_met_on_the_way_down(supernet):
    result = search(supernet, {"params": ["50%"], "macs": ["70%", "30%"]}, charge(supernet, a=5, b=1, c=3))
    assert [n.metric for n in result.networks] == ["macs", "params", "macs"]
    assert all(n.cost.pick(n.metric) <= n.budget for n in result.networks)


def path(result):
    return [(step.group, step.width) for step in result.steps]


@pytest.mark.parametrize(
    ("divisor", "metric", "rank"),
    [(None, "macs", "per_cost"), (None, "params", "loss"), (1, "macs", "loss"), (1, "params", "per_cost")],
)
def test_a_real_network_leaves_little_of_its_budgets_unused(divisor, metric, rank):
    supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32), divisor=divisor)
    groups = supernet.space.groups
    prices = torch.rand(len(groups), generator=torch.Generator().manual_seed(0)).tolist()

    def evaluate(subnet):
        widths = width_of(supernet).values()
        return sum(p * (1 - w / g.size) for p, w, g in zip(prices, widths, groups, strict=True))

    result = search(supernet, {metric: ["70%", "40%", "15%"]}, evaluate, rank=rank, steps=4, refine="none")
    for found in result.networks:
        spent = found.cost.pick(metric)
        assert (0.9 if divisor is None else 0.98) * found.budget < spent <= found.budget
        # and of the group that was cut last, one step less would have been too little
        last = [step.group for step in result.steps if step.budget == found.budget][-1]
        wider = min(c for c in supernet.space[last].choices if c > found.widths[last])
        assert cost(supernet, found.widths.replace(last, wider)).pick(metric) > found.budget
    refined = search(supernet, {metric: ["70%", "40%", "15%"]}, evaluate, rank=rank, steps=4)
    assert path(refined) == path(result)
    for rough, found in zip(result.networks, refined.networks, strict=True):
        assert 0.99 * found.budget <= found.cost.pick(metric) <= found.budget == rough.budget
        assert found.loss <= rough.loss


def test_the_steps_tell_the_way_from_the_widest_to_the_last_network(supernet):
    seen = []
    evaluate = charge(supernet, a=5, b=1, c=3)
    result = search(supernet, {"macs": ["60%", "30%"]}, evaluate, on_step=seen.append, refine="none")
    assert tuple(seen) == result.steps
    assert [step.index for step in seen] == list(range(len(seen)))
    widths = supernet.space.max()
    for before, step in zip([None, *seen], seen, strict=False):
        assert step.width < widths[step.group]
        widths = widths.replace(step.group, step.width)
        assert (step.macs, step.params) == (cost(supernet, widths).macs, cost(supernet, widths).params)
        assert before is None or step.evaluations > before.evaluations
        assert (step.metric, step.limits) == ("macs", {"macs": step.budget})
    assert widths == result.networks[-1].widths
    assert seen[-1].loss == result.networks[-1].loss
    assert {step.budget for step in seen} == {n.budget for n in result.networks}
    data = json.loads(json.dumps(result.to_dict()))
    assert data == result.to_dict()
    assert supernet.space.from_dict(data["networks"][1]["widths"]) == result.networks[1].widths
    assert data["evaluations"] == result.evaluations == seen[-1].evaluations


def test_the_same_search_finds_the_same(supernet):
    torch.manual_seed(1)
    first = search(supernet, {"macs": ["60%", "30%"]}, charge(supernet, a=2, b=1, c=1))
    torch.manual_seed(2)
    again = convert(randomise(Branches()), IMAGE, min=2, divisor=2)
    assert search(again, {"macs": ["60%", "30%"]}, charge(again, a=2, b=1, c=1)).to_dict() == first.to_dict()


def test_a_budget_above_the_widest_is_the_widest(supernet):
    evaluate = charge(supernet, a=5, b=1, c=3)
    result = search(supernet, {"macs": "100%"}, evaluate)
    assert result.networks[0].widths == supernet.space.max()
    assert result.steps == ()
    assert evaluate.calls == 2  # and the narrowest, for the direction


def test_no_subnet_is_scored_twice(supernet):
    seen = []

    def evaluate(subnet):
        seen.append(tuple(width_of(supernet)[name] for name in SIZES))
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
            for norm in subnet.subnet(supernet.open_block).modules():
                if isinstance(norm, nn.BatchNorm2d):
                    values = norm(100 + 50 * torch.randn(64, norm.weight.shape[0], 4, 4)) - norm.bias[:, None, None]
                    assert values.mean().abs() < 0.05
        return out.square().mean()

    search(supernet, {"macs": "60%"}, evaluate)
    assert_same(before, snapshot(supernet.model))


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
    assert [(n.metric, n.budget) for n in result.networks] == [
        ("macs", 0.8 * whole.macs),
        ("macs", 0.5 * whole.macs),
        ("params", 0.4 * whole.params),
    ]
    for found in result.networks:
        assert_filled(supernet, found)
    assert [s.limits for s in result.steps if s.metric == "params"] == [
        result.networks[2].limits for s in result.steps if s.metric == "params"
    ]
    assert result.steps[-1].metric == "params"
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


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (
            {"macs": "0.1%"},
            r"the budget of [\d,]+ macs is out of reach: the narrowest subnet of the search space has [\d,]+ \(",
        ),
        ({"macs": ["50%", 10]}, r"the budget of 10 macs is out of reach"),
        ({"params": "3%"}, r"the budget of [\d,]+ params is out of reach"),
        ({"macs": "half"}, r"the budget: got 'half'; needed: a number"),
        ({"macs": -1}, r"the budget: got -1; needed: a positive number"),
        ({"flops": "50%"}, r"metric: got 'flops'; needed: one of \['macs', 'params', 'peak_bytes', 'latency_ms'\]"),
        ({"macs": None}, "the budget: got None; needed: a number"),
        ({"macs": Decimal(5)}, r"the budget: got Decimal\('5'\); needed: a number"),
        ({"macs": torch.tensor(5)}, r"the budget: got tensor\(5\); needed: a number"),
        ({"macs": True}, "the budget: got True; needed: a number"),
        ({"macs": 10**400}, "the budget: got 1000.*; needed: a positive number"),
        ({"macs": np.int64(5)}, "the budget of 5 macs is out of reach"),
        (None, "budgets: got None; needed: a dict"),
        ({"macs": []}, r"budgets: got no budget; needed: at least one number"),
        ({}, r'budgets: got \{\}; needed: a dict such as \{"macs": \["60%", "300M"\]\}'),
        (True, r'budgets: got True; needed: .*, or one text or a list such as \["50%", "macs<=300M and params<=2M"\]'),
        ([], r"budgets: got \[\]; needed: a dict"),
        (["50 MACs"], r"the budget: got '50 MACs'; needed: a text of METRIC<=AMOUNT joined by `and`"),
        ([0.5], r"the budget: got 0.5; needed: a text of METRIC<=AMOUNT"),
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
        ({"mode": "slow"}, r"mode: got 'slow'; needed: one of \['fast', 'reference'\]"),
        ({"rank": "error"}, r"rank: got 'error'; needed: one of \['loss', 'per_cost'\]"),
        ({"refine": "single"}, r"refine: got 'single'; needed: one of \['units', 'choices', 'none'\]"),
        ({"conditions": 8}, "conditions: got 8; needed: Conditions, or None"),
        ({"steps": 0}, "steps: got 0; needed: a positive integer or None"),
        ({"steps": 2.5}, r"steps: got 2\.5; needed: a positive integer or None"),
        ({"steps": True}, "steps: got True; needed: a positive integer or None"),
        ({"seed": None}, "seed: got None; needed: an integer from"),
        ({"seed": 2**70}, r"seed: got \d+; needed: an integer from"),
        ({"scores": []}, "scores: got a list; needed: a dict, or None"),
        ({"on_step": 5}, "on_step: got 5; needed: a callable that takes a Step, or None"),
        ({"team": 2}, "team: got 2; needed: a Team, or None"),
    ],
)
def test_other_arguments_are_refused_before_anything_is_evaluated(supernet, given, message):
    evaluate = charge(supernet, a=5, b=1, c=3)
    with pytest.raises(ConfigError, match=message):
        search(supernet, {"macs": "50%"}, evaluate, **given)
    assert evaluate.calls == 0


def test_a_model_is_told_to_be_converted(supernet):
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
            r"evaluate returned nan; needed: a finite loss; at the widths \{'a': 16, 'b': 16,",
        ),
        (lambda subnet: torch.tensor(float("inf")), r"evaluate returned inf; needed: a finite loss"),
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
    assert supernet.open_block is None


@pytest.mark.parametrize("to_eval", [lambda s: s.eval(), lambda s: s.model.a_bn.eval()], ids=["all", "one"])
def test_statistics_of_another_network_are_never_scored(supernet, to_eval):
    before = snapshot(supernet.model)

    def evaluate(subnet):
        to_eval(subnet)
        return subnet(IMAGE).square().mean()

    with pytest.raises(StaleStatisticsError, match=r"a_bn: .*evaluate put in evaluation mode.* do not call eval\(\)"):
        search(supernet, {"macs": "50%"}, evaluate)
    assert_same(before, snapshot(supernet.model))


def test_a_search_inside_a_block_is_a_search(supernet):
    outside = search(supernet, {"macs": "50%"}, charge(supernet, a=5, b=1, c=3))
    with supernet.at(supernet.space.min()):
        assert search(supernet, {"macs": "50%"}, charge(supernet, a=5, b=1, c=3)) == outside


def test_parameters_can_be_the_budget():
    supernet = convert(TwoGroups(32), IMAGE)
    found = search(supernet, {"params": "40%"}, lambda subnet: subnet(torch.ones(4, 3, 8, 8)).std()).networks[0]
    assert found.cost.params <= found.budget
