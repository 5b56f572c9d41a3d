"""The baselines land at the budget, count what they score, and find what they are known to find."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch_pruning as tp
from helpers.comparisons import assert_same, snapshot
from helpers.models import randomise
from helpers.searches import IMAGE, SIZES, Branches, Chain, assert_filled, charge, draw_budgets, few, layers, width_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from timm_autoslim import BASELINES, baseline, convert, cost, uniform_at
from timm_autoslim.errors import BudgetError, ConfigError, EvaluationError, WidthError
from timm_autoslim.slimming.baselines import rank_within_structures

KINDS = list(BASELINES)
FEW = {"candidates": 12, "population": 4}


@pytest.fixture
def supernet():
    return convert(randomise(Branches()), IMAGE, min=2, divisor=2)


@pytest.mark.slow
@few
@given(layers, st.data())
def test_every_baseline_fills_every_budget_counts_and_repeats_itself(layers, data):
    supernet = convert(Chain(layers), IMAGE)
    units = [{"macs"}, {"params"}, {"macs", "params"}]
    texts = [draw_budgets(supernet, data.draw, u) for u in units]
    criterion = data.draw(st.sampled_from(["l1", "l2", "bn_scale", "fpgm", "lamp", "random"]))
    seen = []

    def evaluate(subnet):
        seen.append(supernet.space.from_dict(width_of(supernet)))
        subnet(IMAGE)
        return sum(1 / w for w in seen[-1].values())

    for kind in KINDS:
        seen.clear()
        result = baseline(supernet, texts, evaluate, kind, criterion=criterion, **FEW)
        assert len(seen) == len(set(seen)) == result.evaluations
        assert result.evaluated_macs == sum(cost(supernet, widths).macs for widths in seen)
        assert result.evaluations <= 3 * (12 if kind in ("random", "evolutionary") else 1)
        assert result.steps == ()
        for found in result.networks:
            assert found.loss == sum(1 / w for w in found.widths.values())
            assert all(found.widths[g.name] >= g.choices[0] for g in supernet.space.groups)
            if kind == "uniform":
                assert all(found.cost.pick(metric) <= limit for metric, limit in found.limits.items())
            else:
                assert_filled(supernet, found)
        state = torch.get_rng_state()
        assert baseline(supernet, texts, evaluate, kind, criterion=criterion, **FEW) == result
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_uniform_is_uniform_at(supernet, metric):
    result = baseline(supernet, {metric: ["70%", "30%"]}, charge(supernet, a=5, b=1, c=3), "uniform")
    assert [n.widths for n in result.networks] == [uniform_at(supernet, metric, share) for share in ("70%", "30%")]


@pytest.mark.parametrize("kind", ["random", "evolutionary"])
def test_the_best_of_all_that_was_scored_is_found(supernet, kind):
    scores = []

    def evaluate(subnet):
        scores.append(((width_of(supernet)["a"] * 7 + width_of(supernet)["b"] * 5) % 11, width_of(supernet)))
        return scores[-1][0]

    found = baseline(supernet, {"macs": "40%"}, evaluate, kind, candidates=20, population=6).networks[0]
    # after the widest and the narrowest, for the direction of the loss; of equals the first that was drawn
    assert (found.loss, found.widths.to_dict()) == min(scores[2:], key=lambda score: score[0])
    assert len(scores) > 6  # more than the first population


def test_another_seed_draws_others(supernet):
    evaluate = charge(supernet, a=5, b=1, c=3)
    for kind in ("random", "evolutionary"):
        drawn = [baseline(supernet, {"macs": "40%"}, evaluate, kind, candidates=3, seed=s).networks for s in range(4)]
        assert len({network.widths for (network,) in drawn}) > 1


def test_each_budget_is_searched_as_if_alone(supernet):
    evaluate = charge(supernet, a=5, b=1, c=3)
    for kind in KINDS:
        both = baseline(supernet, {"macs": ["60%", "30%"]}, evaluate, kind, **FEW)
        alone = [baseline(supernet, {"macs": share}, evaluate, kind, **FEW).networks[0] for share in ("60%", "30%")]
        assert list(both.networks) == alone


def test_evolution_climbs_further_than_chance():
    supernet = convert(Chain([(24, False)] * 6), IMAGE)
    target = {g.name: (20, 6)[i % 2] for i, g in enumerate(supernet.space.groups)}

    def evaluate(subnet):
        return sum((w - target[n]) ** 2 for n, w in width_of(supernet).items())

    budget = {"macs": cost(supernet, supernet.space.from_dict(target)).macs}
    errors = {
        kind: [baseline(supernet, budget, evaluate, kind, candidates=80, seed=s).networks[0].loss for s in range(3)]
        for kind in KINDS
    }
    assert all(one < other for one, other in zip(errors["evolutionary"], errors["random"], strict=True))
    assert max(errors["evolutionary"]) < errors["uniform"][0]


# -- importance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale"])
def test_the_least_important_channels_of_the_whole_network_go_first(supernet, criterion):
    weak = {"a": 7, "b": 0, "c": 12}
    with torch.no_grad():
        for name, count in weak.items():
            norm = supernet.model.get_submodule(f"{name}_bn")
            norm.weight.fill_(1)
            norm.bias.fill_(1)
            for layer, axis in ((name, 0), (f"{name}_out", 1)):
                supernet.model.get_submodule(layer).weight.fill_(1)
                supernet.model.get_submodule(layer).weight.narrow(axis, 0, count).fill_(1e-3)
            norm.weight[:count] = 1e-3  # the first, so that it is the score and not the place that counts
    kept = supernet.space.from_dict({name: SIZES[name] - count for name, count in weak.items()})
    evaluate = charge(supernet, a=5, b=1, c=3)
    result = baseline(supernet, {"macs": cost(supernet, kept).macs}, evaluate, "importance", criterion=criterion)
    assert result.networks[0].widths == kept
    assert evaluate.calls == 1


def test_no_group_is_ranked_below_its_narrowest_width(supernet):
    with torch.no_grad():
        supernet.model.a.weight.mul_(torch.logspace(0, -12, 16).view(-1, 1, 1, 1))
        supernet.model.a_out.weight.mul_(torch.logspace(0, -12, 16).view(1, -1, 1, 1))
    evaluate = charge(supernet, a=5, b=1, c=3)
    for share in ("80%", "40%", "10%"):
        assert baseline(supernet, {"macs": share}, evaluate, "importance").networks[0].widths["a"] >= 2


def test_groups_without_scores_keep_the_share_that_others_keep():
    """Chain has no BatchNorm at all, so by its scales all groups are alike."""
    supernet = convert(Chain([(32, False), (32, False), (16, False)]), IMAGE)
    found = baseline(
        supernet, {"macs": "40%"}, lambda s: sum(width_of(supernet).values()), "importance", criterion="bn_scale"
    ).networks[0]
    shares = [found.widths[g.name] / g.size for g in supernet.space.groups]
    assert max(shares) - min(shares) <= 1 / 8


def test_isomorphic_groups_are_ranked_together_and_lose_one_share():
    model = nn.Sequential(
        nn.Conv2d(3, 20, 1), nn.Conv2d(20, 12, 1), nn.Conv2d(12, 8, 1), nn.Flatten(),
        nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, 2),
    )  # fmt: skip
    supernet = convert(model, torch.randn(1, 3, 1, 1))
    names = supernet.space.names
    assert names == ("0", "1", "2", "4", "5")
    # of convolutions 0 and 1, of a convolution that a linear layer reads, and of linear layers 4 and 5
    scores = [np.linspace(9, 8, 20), np.linspace(8.6, 7, 12), np.full(8, 3.0), np.linspace(2, 1, 10), np.zeros(6)]
    ranks = dict(zip(names, rank_within_structures(supernet, scores), strict=True))
    for kind, size in (("01", 32), ("2", 8), ("45", 16)):
        assert np.allclose(np.sort(np.concatenate([ranks[name] for name in kind])), (np.arange(size) + 0.5) / size)
    assert all((np.diff(part) < 0).all() for part in ranks.values())  # falling still
    assert min(ranks["4"]) > max(ranks["5"])  # which linear layers alone are compared in
    lost = {name: int((part < 0.5).sum()) for name, part in ranks.items()}
    assert lost == {"0": 6, "1": 10, "2": 4, "4": 2, "5": 6}


def test_where_all_groups_are_isomorphic_it_is_the_global_ranking(supernet):
    for share in ("80%", "40%"):
        one, two = (
            baseline(supernet, {"macs": share}, lambda subnet: 0.0, method).networks[0].widths
            for method in ("importance", "isomorphic")
        )
        assert one == two


@pytest.mark.slow
@pytest.mark.parametrize(("method", "isomorphic"), [("importance", False), ("isomorphic", True)])
@pytest.mark.parametrize("criterion", ["taylor", "l2"])
def test_the_widths_are_those_of_torch_pruning(method, isomorphic, criterion):
    torch.manual_seed(0)
    model = timm.create_model("resnet26", num_classes=10, zero_init_last=False).eval()
    images, targets = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    torch.nn.functional.cross_entropy(model(images), targets).backward()
    supernet = convert(model, images[:1], min=1)
    pruned = copy.deepcopy(model)
    for ours, theirs in zip(model.parameters(), pruned.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    importances = {
        "taylor": tp.importance.GroupTaylorImportance(), "l2": tp.importance.GroupMagnitudeImportance(p=2)
    }  # fmt: skip
    tp.pruner.BasePruner(
        pruned, images[:1], importance=importances[criterion], global_pruning=True, pruning_ratio=0.4,
        ignored_layers=[pruned.fc], isomorphic=isomorphic,
    ).step()  # fmt: skip
    budget = cost(convert(pruned, images[:1])).macs
    result = baseline(supernet, {"macs": budget}, lambda subnet: 0.0, method, criterion=criterion)
    ours = dict(supernet.extract(result.networks[0].widths).named_modules())
    for path, layer in pruned.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert abs(layer.out_channels - ours[path].out_channels) <= 1, path


def test_taylor_needs_gradients(supernet):
    evaluate = charge(supernet, a=5, b=1, c=3)
    with pytest.raises(WidthError, match=r'a\.weight: got no gradient; .* criterion "taylor"'):
        baseline(supernet, {"macs": "50%"}, evaluate, "importance", criterion="taylor")
    assert evaluate.calls == 0
    supernet(torch.randn(4, 3, 8, 8)).square().mean().backward()
    before = snapshot(supernet.model)
    found = baseline(supernet, {"macs": "50%"}, evaluate, "importance", criterion="taylor").networks[0]
    assert_filled(supernet, found)
    assert_same(before, snapshot(supernet.model))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"method": "greedy"},
            ValueError,
            r"method: got 'greedy'; needed: one of \['uniform', 'random',",
        ),
        ({"criterion": "size"}, ValueError, r"criterion: got 'size'; needed: one of \['l1', 'l2', 'bn_scale',"),
        ({"candidates": 0}, ValueError, "candidates: got 0; needed: a positive integer"),
        ({"population": 1}, ValueError, "population: got 1; needed: an integer from 2 to"),
        ({"candidates": 2.5}, ConfigError, r"candidates: got 2\.5; needed: a positive integer"),
        ({"seed": "a"}, ConfigError, "seed: got 'a'; needed: an integer from"),
        ({"criterion": []}, ConfigError, r"criterion: got \[\]; needed: one of"),
        ({"budgets": {"macs": "0.1%"}}, BudgetError, r"the budget of [\d,]+ macs is out of reach"),
        ({"budgets": ["macs<=50% and params<=1%"]}, BudgetError, r"the budget of [\d,]+ params is out of reach"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_evaluated(supernet, given, error, message):
    evaluate = charge(supernet, a=5, b=1, c=3)
    with pytest.raises(error, match=message):
        baseline(supernet, **{"budgets": {"macs": "50%"}, "evaluate": evaluate, "method": "random", **given})
    assert evaluate.calls == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluate_that_fails_is_told_with_the_widths(supernet, kind):
    with pytest.raises(
        EvaluationError, match=r"evaluate returned nan; .*at the widths \{'a': \d+, 'b': \d+, 'c': \d+\}"
    ):
        baseline(supernet, {"macs": "50%"}, lambda subnet: float("nan"), kind)
