"""Scoring: each subnet once, counted in images times MACs, in parts, and from earlier scores."""

import pytest
import torch
from helpers.searches import IMAGE, PRICES, held_out, make_supernet
from torch import nn

from timm_autoslim import HeldOut, Team, baseline, convert, cost, search
from timm_autoslim.errors import DataError, EvaluationError, StaleStatisticsError
from timm_autoslim.slimming.scoring import Scorer, _are_same


def test_forward_work_is_images_times_macs():
    supernet, seen = make_supernet(), []
    score = Scorer(supernet, held_out(supernet, seen=seen))
    narrow, wide = supernet.space.min(), supernet.space.max()
    whole = score.many([narrow, wide, narrow])
    assert whole[0] == whole[2] > whole[1]
    assert whole[1] == pytest.approx(sum(PRICES[n] * 1.15 / w for n, w in wide.items()))
    assert seen == [(w, part) for w in (narrow, wide) for part in range(4)]
    assert score.macs == (1 + 2 + 3 + 4) * (cost(supernet, narrow).macs + cost(supernet, wide).macs)
    assert (score.evaluations, score.images) == (2, 1 + 2 + 3 + 4)


def test_more_parts_are_scored_only_when_they_are_needed():
    supernet, seen = make_supernet(), []
    score = Scorer(supernet, held_out(supernet, seen=seen))
    wide = supernet.space.max()
    first = score.many([wide], parts=1)
    assert [part for _, part in seen] == [0]
    assert score.many([wide], parts=3)[0] == pytest.approx(first[0] * 1.1)
    assert [part for _, part in seen] == [0, 1, 2]
    assert score(wide) == pytest.approx(first[0] * 1.15)
    assert [part for _, part in seen] == [0, 1, 2, 3]
    assert (score.evaluations, score.images) == (1, 10)


METHODS = {
    "fast": lambda s, e, **more: search(s, {"macs": ["60%", "30%"]}, e, **more),
    "reference": lambda s, e, **more: search(s, {"macs": ["60%", "30%"]}, e, mode="reference", **more),
    "random": lambda s, e, **more: baseline(s, {"macs": "40%"}, e, "random", candidates=12, **more),
    "evolutionary": lambda s, e, **more: baseline(
        s, {"macs": "40%"}, e, "evolutionary", candidates=20, population=6, **more
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_known_is_not_scored_again_and_the_result_is_the_same(method):
    supernet, scores, seen = make_supernet(), {}, []
    whole = METHODS[method](supernet, held_out(supernet), scores=scores)
    again = METHODS[method](supernet, held_out(supernet, seen=seen), scores=dict(scores))
    assert len(seen) == 2  # two scores, to make sure that all are of these weights
    assert again == whole
    assert again.to_dict() == whole.to_dict()
    half = dict(list(scores.items())[: len(scores) // 2])
    assert METHODS[method](supernet, held_out(supernet, seen=seen), scores=half) == whole
    assert len(seen) == 4 + len(scores) - len(scores) // 2


def swap(supernet, batch):
    """Return what another order of channels changes: nothing in the widest."""
    return 1.0 if supernet.open_block == supernet.space.max() else 1.5


@pytest.mark.parametrize(("before", "now", "same"), [
    ([0.1, 50], [0.12, 50], True), ([0.1, 50], [0.2, 50], False), ([10.0, 50], [12.0, 50], True),
    ([10, 50], [12, 50], True), ([10, 50], [13, 50], False), ([1e-9, 8], [2e-9, 8], True),
    ([2.3456, 8], [2.3477, 8], True), ([2.3456, 8], [2.3987, 8], False), ([2.3456, 8], [2.3456, 9], False),
])  # fmt: skip
def test_scores_are_the_same_but_for_rounding_and_an_image_or_two(before, now, same):
    assert _are_same(before, now) is same


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_other_weights_images_or_another_metric_are_refused(method):
    supernet, scores = make_supernet(), {}
    METHODS[method](supernet, held_out(supernet), scores=scores)
    evaluate, others = held_out(supernet), {"9,9,9,9:0": [7.0, 1], **scores}
    doubled = HeldOut(evaluate.batches, lambda subnet, batch: 2 * evaluate.score(subnet, batch))
    with pytest.raises(EvaluationError, match=r"scores\['[0-9,]+:0'\]: got .* where evaluate returns .*an empty dict"):
        METHODS[method](supernet, doubled, scores=dict(others))
    narrow = HeldOut(evaluate.batches, lambda subnet, batch: evaluate.score(subnet, batch) * swap(supernet, batch))
    with pytest.raises(EvaluationError, match=r"scores\['[0-9,]+:[0-9]+'\]: got .* channel order"):
        METHODS[method](supernet, narrow, scores=dict(others))
    nearly = HeldOut(evaluate.batches, lambda subnet, batch: 1.001 * evaluate.score(subnet, batch))
    METHODS[method](supernet, nearly, scores=others)


def test_a_failure_in_one_process_reaches_all_and_keeps_what_was_scored():
    supernet, known = make_supernet(), {}

    def score(subnet, part):
        subnet(IMAGE)
        return float("nan") if part == 3 else 1.0

    other = [("1,1,1:0", [1.0, 1]), ("2,2,2:0", EvaluationError("of another process"))]
    scorer = Scorer(supernet, HeldOut(range(4), score), known, Team(0, 2, lambda items: [*items, *other]))
    with pytest.raises(EvaluationError, match="of another process"):
        scorer.many([supernet.space.max()])
    alone = Scorer(supernet, HeldOut(range(4), score), known := {})
    with pytest.raises(EvaluationError, match=r"evaluate returned nan; .*at the widths \{'a': 16"):
        alone.many([supernet.space.max()])
    assert list(known) == ["16,16,32:0", "16,16,32:1", "16,16,32:2"]
    assert supernet.open_block is None
    assert not supernet.model._forward_pre_hooks


@pytest.mark.parametrize("team", [None, Team(0, 2, lambda items: pytest.fail("it was killed before"))])
def test_what_was_scored_before_the_process_was_killed_is_kept(team):
    supernet, known = make_supernet(), {}

    def score(subnet, part):
        if len(known) == 3:
            raise KeyboardInterrupt
        return 1.0

    scorer = Scorer(supernet, HeldOut(range(8), score), known, team)
    with pytest.raises(KeyboardInterrupt):
        scorer.many([supernet.space.max()])
    assert len(known) == 3


@pytest.mark.parametrize(
    "value", [None, "abc", [1.0], ["a", 64], [float("nan"), 8], [1.0, -1], [1.0, None], [None, 8], 5, {"a": 1}, []]
)
@pytest.mark.parametrize("method", ["fast", "random"])
def test_known_scores_that_are_none_are_refused_by_their_key(method, value):
    supernet, seen = make_supernet(), []
    with pytest.raises(
        EvaluationError, match=r"scores\['1,2,3:0'\]: got .*; needed: \[loss, images\], a finite number"
    ):
        METHODS[method](supernet, held_out(supernet, seen=seen), scores={"4,4,4:0": [0.5, 8], "1,2,3:0": value})
    assert not seen


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ((part for part in range(3)), r"got a generator of batches; needed: a sequence, .*such as list\(loader\)"),
        (None, "got a NoneType of batches"),
        (5, "got a int of batches"),
        (torch.utils.data.DataLoader(range(3)), "got a DataLoader of batches"),
        ({0: 1}, "got a dict of batches"),
    ],
)
def test_batches_that_cannot_be_taken_again_are_refused(batches, message):
    with pytest.raises(DataError, match=message):
        HeldOut(batches, lambda subnet, batch: 0.0)


def test_evaluate_moves_no_flag_of_the_supernet():
    supernet = make_supernet().train()
    with pytest.raises(StaleStatisticsError):
        Scorer(supernet, lambda subnet: float(subnet.eval()(IMAGE).sum()))(supernet.space.max())
    assert supernet.training
    assert all(module.training for module in supernet.modules())


def test_an_evaluate_without_a_forward_costs_nothing():
    supernet = make_supernet()
    scorer = Scorer(supernet, lambda subnet: 1.0)
    assert scorer(supernet.space.min()) == 1.0
    assert (scorer.evaluations, scorer.macs, scorer.images) == (1, 0, 0)
    named = Scorer(supernet, lambda subnet: float(subnet(x=torch.zeros(7, 3, 8, 8)).sum()))
    named(supernet.space.max())
    assert named.macs == 7 * cost(supernet).macs


def test_a_loss_of_every_image_is_told():
    supernet = make_supernet()
    with pytest.raises(
        EvaluationError, match=r"evaluate: got a tensor of the shape \(3,\); needed: one number.*reduction"
    ):
        Scorer(supernet, lambda subnet: torch.ones(3))(supernet.space.max())


def test_a_batch_of_one_image_is_told_with_what_to_do():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    supernet = convert(model, torch.zeros(1, 3, 32, 32))
    scorer = Scorer(supernet, lambda subnet: subnet(torch.zeros(1, 3, 32, 32)).mean())
    with pytest.raises(EvaluationError, match=r"got a batch of one image, .* two images or more .* drop_last=True"):
        scorer(supernet.space.max())
