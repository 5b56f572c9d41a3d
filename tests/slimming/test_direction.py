"""Scores the wrong way round: an accuracy is maximised, and one that is taken for a loss is refused."""

import warnings

import pytest
import torch
from helpers.searches import IMAGE, SIZES, make_supernet, width_of

from timm_autoslim import HeldOut, SearchResult, baseline, search
from timm_autoslim.errors import ConfigError, EvaluationError
from timm_autoslim.slimming.report import write_report

IMAGES = 40
BUDGET = {"macs": "50%"}


def share(supernet):
    """Return how much of all channels a subnet has."""
    return sum(width_of(supernet).values()) / sum(SIZES.values())


def count_right(supernet, scale=1.0, parts=2):
    """Return an evaluate in parts: an accuracy of `IMAGES` images that falls with the channels."""

    def score(subnet, part):
        subnet(IMAGE.repeat(IMAGES, 1, 1, 1))
        return scale * round(IMAGES * (0.1 + 0.8 * share(supernet))) / IMAGES

    return HeldOut(range(parts), score)


def lose(supernet, low=0.3, high=2.3):
    """Return an evaluate: a loss that rises from `low` for the widest to `high` without channels."""

    def evaluate(subnet):
        subnet(IMAGE.repeat(IMAGES, 1, 1, 1))
        return high + (low - high) * share(supernet) + 1e-4 * torch.pi

    return evaluate


@pytest.mark.parametrize("scale", [1.0, 100.0, IMAGES], ids=["share", "per cent", "count"])
@pytest.mark.parametrize("method", ["search", "random", "evolutionary"])
def test_an_accuracy_is_refused_as_a_loss_and_taken_as_a_score(method, scale):
    supernet = make_supernet()

    def run(**options):
        evaluate = count_right(supernet, scale)
        if method == "search":
            return search(supernet, BUDGET, evaluate, **options)
        return baseline(supernet, BUDGET, evaluate, method, candidates=8, population=4, **options)

    with pytest.raises(EvaluationError, match=r"evaluate: got .*needed: numbers that are lower.*give maximize=True"):
        run()
    result = run(maximize=True)
    assert result.maximize
    assert -scale <= result.networks[0].loss < -0.1 * scale


def test_a_maximised_score_and_its_negative_find_the_same():
    supernet = make_supernet()
    score = count_right(supernet, parts=8)
    loss = HeldOut(score.batches, lambda subnet, part: -score.score(subnet, part))
    up, down = search(supernet, BUDGET, score, maximize=True), search(supernet, BUDGET, loss)
    assert (up.networks, up.steps) == (down.networks, down.steps)
    assert up.settings == {**down.settings, "maximize": True}


def test_scores_hold_what_evaluate_returned_so_a_refused_search_can_go_on():
    supernet, scores = make_supernet(), {}
    with pytest.raises(EvaluationError, match="maximize=True"):
        search(supernet, BUDGET, count_right(supernet), scores=scores)
    assert len(scores) == 2
    assert all(score > 0 for score, _ in scores.values())
    first = dict(scores)
    search(supernet, BUDGET, count_right(supernet), scores=scores, maximize=True)
    assert first.items() <= scores.items()


def test_a_loss_is_refused_as_a_score_only_where_it_counts_images():
    supernet = make_supernet()
    errors = HeldOut(range(2), lambda subnet, part: 1 - count_right(supernet).score(subnet, part))
    with pytest.raises(EvaluationError, match=r"needed: numbers that are higher.*leave out maximize=True"):
        search(supernet, BUDGET, errors, maximize=True)
    with pytest.warns(UserWarning, match="leave out maximize=True"):
        search(supernet, BUDGET, lose(supernet), maximize=True, refine="none")


@pytest.mark.parametrize(
    ("widest", "narrowest", "warned"),
    [
        (0.3, 2.3, False),
        (2.30, 2.30, False),
        (2.33, 2.30, False),
        (3.1, 2.3, True),
        (40.0, 2.3, True),
        (-5.0, -9.0, True),
    ],
)
def test_a_loss_is_never_refused(widest, narrowest, warned):
    """An untrained supernet's widest subnet may have a much higher loss than its narrowest."""
    supernet = make_supernet()
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        search(supernet, {"macs": "90%"}, lose(supernet, widest, narrowest), refine="none", steps=2)
    texts = [str(message.message) for message in messages if message.category is UserWarning]
    assert bool(texts) == warned
    assert all("maximize=True; else the supernet is untrained" in text for text in texts)


def test_methods_that_do_not_choose_by_the_loss_score_nothing_more():
    supernet = make_supernet()
    for method in ("uniform", "importance"):
        assert baseline(supernet, BUDGET, count_right(supernet), method).evaluations == 1


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_maximize_is_a_bool(value):
    supernet = make_supernet()
    with pytest.raises(ConfigError, match=r"maximize: got .*; needed: True or False"):
        search(supernet, BUDGET, lose(supernet), maximize=value)


def test_the_report_names_negative_scores(tmp_path):
    supernet = make_supernet()
    result = search(supernet, BUDGET, count_right(supernet), maximize=True, refine="none", steps=2)
    path = tmp_path / "search" / "searched.json"
    result.save(path)
    assert SearchResult.load(path) == result
    assert "held-out loss (negative score)" in write_report(tmp_path).read_text(encoding="utf-8")
