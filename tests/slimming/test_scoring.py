"""Scoring: each subnet once, counted in images times MACs, in parts, by several processes, and from what is known."""

import threading

import pytest
import torch
from helpers.searches import IMAGE, PRICES, LatencyFunction, held_out, in_step, make_supernet, width_of

from timm_autoslim import Conditions, HeldOut, SharedLatency, Team, baseline, cost, search
from timm_autoslim.errors import ConfigError, DataError, EvaluationError, LatencyError, StaleStatisticsError
from timm_autoslim.slimming.scoring import Scorer


def test_forward_work_is_images_times_macs():
    supernet, seen = make_supernet(), []
    score = Scorer(supernet, held_out(supernet, seen=seen))
    narrow, wide = supernet.space.min(), supernet.space.max()
    whole = score.many([narrow, wide, narrow])
    assert whole[0] == whole[2] > whole[1]
    assert whole[1] == pytest.approx(sum(PRICES[n] * 1.15 / w for n, w in wide.items()))
    assert seen == [(w, part) for w in (narrow, wide) for part in range(4)]
    assert score.macs == (1 + 2 + 3 + 4) * (cost(supernet, narrow).macs + cost(supernet, wide).macs)
    assert score.evaluations == 2


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
    assert score.evaluations == 1


def test_held_out_is_an_ordinary_evaluate_too():
    supernet = make_supernet()
    evaluate = held_out(supernet)
    whole = sum(PRICES[n] * 1.15 / w for n, w in width_of(supernet).items())
    assert evaluate(supernet) == pytest.approx(whole)
    with pytest.raises(DataError, match=r"HeldOut\(\) got no batches"):
        HeldOut([], lambda subnet, batch: 0.0)


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
    assert not seen
    assert again == whole
    assert again.to_dict() == whole.to_dict()
    half = dict(list(scores.items())[: len(scores) // 2])
    assert METHODS[method](supernet, held_out(supernet, seen=seen), scores=half) == whole
    assert len(seen) == len(scores) - len(scores) // 2


def together(count, work):
    """Return what `work(team)` returns in each process: threads, which meet at a barrier as processes do."""
    barrier, lists, results = threading.Barrier(count), [None] * count, [None] * count

    def run(index):
        def gather(items):
            lists[index] = items
            barrier.wait(60)
            joined = [item for part in lists for item in part]
            barrier.wait(60)
            return joined

        results[index] = work(Team(index, count, gather))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 3])
def test_a_team_finds_what_one_finds_and_shares_the_work(method, count):
    alone = METHODS[method](one := make_supernet(), held_out(one))
    seen = [[] for _ in range(count)]

    def work(team):
        supernet = make_supernet()
        return METHODS[method](supernet, held_out(supernet, seen=seen[team.index]), team=team)

    results = together(count, work)
    assert [result.to_dict() for result in results] == [alone.to_dict()] * count
    jobs = [job for part in seen for job in part]
    assert len(jobs) == len(set(jobs))
    if method == "fast":  # looks at two candidates at a time, so a third process often has nothing to do
        assert max(len(part) for part in seen) < 0.7 * len(jobs)
    else:
        assert min(len(part) for part in seen) > 0.5 * len(jobs) / count


class Clock:
    """Predicts times that grow with the widths, and shake as measured ones do."""

    def __init__(self, seed):
        self.generator, self.asked = torch.Generator().manual_seed(seed), []

    def predict(self, supernet, widths):
        self.asked.append(widths)
        return sum(widths.values()) * (1 + 0.01 * float(torch.rand((), generator=self.generator)))


@pytest.mark.parametrize("method", [search, lambda *given, **more: baseline(*given, "random", candidates=6, **more)])
def test_a_team_goes_by_the_times_of_its_first_process(method):
    budgets, clocks = ["latency_ms<=60% and macs<=80%", "latency_ms<=30%"], [Clock(seed) for seed in range(3)]

    def work(team):
        supernet = make_supernet()
        clock = clocks[team.index] if team.count > 1 else Clock(0)
        supernet.conditions = Conditions(latency=SharedLatency(clock, team))
        found = method(supernet, budgets, held_out(supernet), team=team)
        return found.to_dict(), [network.cost.latency_ms for network in found.networks]

    assert together(3, work) == [work(Team())] * 3
    assert len(clocks[0].asked) == len(set(clocks[0].asked)) > 10
    assert not clocks[1].asked + clocks[2].asked


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_a_team_and_a_resumed_search_find_the_same_where_no_first_step_saves(mode):
    scores = {}

    def work(team, known=None):
        supernet = make_supernet()
        supernet.conditions = Conditions(latency=SharedLatency(LatencyFunction(in_step), team))
        budgets = ["latency_ms<=60% and macs<=80%", "latency_ms<=30%"]
        return search(supernet, budgets, held_out(supernet), mode=mode, scores=known, team=team).to_dict()

    alone = work(Team(), scores)
    assert together(2, work) == [alone] * 2
    assert work(Team(), dict(list(scores.items())[: len(scores) // 2])) == alone
    spent = [step["spent"]["latency_ms"] for step in alone["steps"]]
    assert max(spent) > 10  # of the widest


def test_what_stops_the_first_process_from_measuring_stops_all():
    class Broken:
        def predict(self, supernet, widths):
            raise LatencyError("the clock is broken")

    def work(team):
        supernet = make_supernet()
        supernet.conditions = Conditions(latency=SharedLatency(None if team.index else Broken(), team))
        with pytest.raises(LatencyError, match="the clock is broken"):
            search(supernet, {"latency_ms": 5}, held_out(supernet), team=team)
        return "told"

    assert together(2, work) == ["told", "told"]
    with pytest.raises(LatencyError, match="got no latency in the first process; needed: a LatencyTable there"):
        SharedLatency(None, Team())


def test_a_full_disk_of_the_first_process_is_told_to_all():
    class Full:
        def predict(self, supernet, widths):
            raise OSError("disk full")

    def work(team):
        supernet = make_supernet()
        with pytest.raises(LatencyError, match="predicting the latency raised OSError: disk full"):
            SharedLatency(None if team.index else Full(), team).predict(supernet, supernet.space.max())
        return "told"

    assert together(2, work) == ["told", "told"]


def test_times_of_every_process_by_itself_are_refused():
    supernet = make_supernet()
    supernet.conditions = Conditions(latency=Clock(0))
    for method in (search, lambda *given, **more: baseline(*given, "uniform", **more)):
        with pytest.raises(LatencyError, match=r"got a Clock in 2 processes, .*SharedLatency\(table, team\)"):
            method(supernet, {"latency_ms": "60%"}, held_out(supernet), team=Team(0, 2))
    assert not supernet.conditions.latency.asked


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
    assert supernet._held is None
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
        EvaluationError, match=r"scores\['1,2,3:0'\]: got .*; needed: \[error, images\], a finite number"
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


@pytest.mark.parametrize(("index", "count"), [(3, 2), (2, 2), (0, 0), (-1, 2), ("0", 1), (0, True)])
def test_a_team_without_this_process_is_refused(index, count):
    with pytest.raises(ConfigError, match=r"Team\.(index|count): got .*; needed: "):
        Team(index, count)


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
    assert (scorer.evaluations, scorer.macs) == (1, 0)
    named = Scorer(supernet, lambda subnet: float(subnet(x=torch.zeros(7, 3, 8, 8)).sum()))
    named(supernet.space.max())
    assert named.macs == 7 * cost(supernet).macs
