"""A team of processes finds what one finds, and goes by the latencies of the first."""

import threading

import pytest
import torch
from helpers.marks import slow_but
from helpers.searches import LatencyFunction, held_out, in_step, make_supernet

from timm_autoslim import Conditions, SharedLatency, Team, baseline, search
from timm_autoslim.errors import ConfigError, LatencyError

METHODS = {
    "fast": lambda s, e, **more: search(s, {"macs": ["60%", "30%"]}, e, **more),
    "reference": lambda s, e, **more: search(s, {"macs": ["60%", "30%"]}, e, mode="reference", **more),
    "random": lambda s, e, **more: baseline(s, {"macs": "40%"}, e, "random", candidates=12, **more),
    "evolutionary": lambda s, e, **more: baseline(
        s, {"macs": "40%"}, e, "evolutionary", candidates=20, population=6, **more
    ),
}


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


@pytest.mark.parametrize("method", slow_but(["fast", "evolutionary"], METHODS))
@pytest.mark.parametrize("count", slow_but([3], [2, 3]))
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
        conditions = Conditions(latency=SharedLatency(clock, team))
        found = method(supernet, budgets, held_out(supernet), conditions=conditions, team=team)
        return found.to_dict(), [network.cost.latency_ms for network in found.networks]

    assert together(3, work) == [work(Team())] * 3
    assert len(clocks[0].asked) == len(set(clocks[0].asked)) > 10
    assert not clocks[1].asked + clocks[2].asked


@pytest.mark.parametrize("mode", slow_but(["fast"], ["fast", "reference"]))
def test_a_team_and_a_resumed_search_find_the_same_where_no_first_step_saves(mode):
    scores = {}

    def work(team, known=None):
        supernet = make_supernet()
        conditions = Conditions(latency=SharedLatency(LatencyFunction(in_step), team))
        budgets = ["latency_ms<=60% and macs<=80%", "latency_ms<=30%"]
        shared = {"conditions": conditions, "scores": known, "team": team}
        return search(supernet, budgets, held_out(supernet), mode=mode, **shared).to_dict()

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
        conditions = Conditions(latency=SharedLatency(None if team.index else Broken(), team))
        with pytest.raises(LatencyError, match="the clock is broken"):
            search(supernet, {"latency_ms": 5}, held_out(supernet), conditions=conditions, team=team)
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
    clock = Clock(0)
    for method in (search, lambda *given, **more: baseline(*given, "uniform", **more)):
        with pytest.raises(
            LatencyError, match=r"conditions\.latency: got a Clock in 2 processes, .*SharedLatency\(table, team\)"
        ):
            method(
                supernet,
                {"latency_ms": "60%"},
                held_out(supernet),
                conditions=Conditions(latency=clock),
                team=Team(0, 2),
            )
    assert not clock.asked


@pytest.mark.parametrize(("index", "count"), [(3, 2), (2, 2), (0, 0), (-1, 2), ("0", 1), (0, True)])
def test_a_team_without_this_process_is_refused(index, count):
    with pytest.raises(ConfigError, match=r"Team\.(index|count): got .*; needed: "):
        Team(index, count)
