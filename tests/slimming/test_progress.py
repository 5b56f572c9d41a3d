"""Progress bars: shown by default, by the first process alone, and off by a flag."""

import pytest
from helpers.searches import held_out, make_supernet

from timm_autoslim import Budget, Cost, Step, Team, baseline, cost, parse_budgets, search
from timm_autoslim.slimming.progress import DescentBar, show_descent
from timm_autoslim.slimming.scoring import Scorer


def test_a_search_shows_how_far_it_is_unless_it_shall_not(terminal):
    supernet = make_supernet()
    search(supernet, {"macs": "50%"}, held_out(supernet))
    shown = terminal.readouterr().err
    assert "search:   0%" in shown
    assert "loss" in shown
    search(supernet, {"macs": "50%"}, held_out(supernet), progress=False)
    baseline(supernet, {"macs": "50%"}, held_out(supernet), "uniform", progress=False)
    assert terminal.readouterr().err == ""
    baseline(supernet, {"macs": "50%"}, held_out(supernet), "random", candidates=3)
    assert "baseline random: " in terminal.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_only_the_first_process_of_a_team_shows_a_bar():
    supernet = make_supernet()
    budgets = parse_budgets(supernet, {"macs": "50%"})
    for index, hidden in ((0, False), (1, True)):
        scorer = Scorer(supernet, held_out(supernet), team=Team(index, 2))
        with show_descent(scorer, cost(supernet), budgets, progress=True) as bar:
            assert bool(bar.bar.disable) is hidden


def test_scores_are_counted_while_a_network_is_refined(terminal, monkeypatch):
    supernet = make_supernet()
    clock = iter(range(1000))
    monkeypatch.setattr("timm_autoslim.slimming.progress.time.monotonic", lambda: next(clock))
    scorer = Scorer(supernet, held_out(supernet, parts=3))
    with show_descent(scorer, cost(supernet), parse_budgets(supernet, {"macs": "50%"}), progress=True):
        scorer(supernet.space.min())
    assert "the widest subnet; then 3 scores" in terminal.readouterr().err


def test_a_bar_reaches_its_end_at_the_smallest_budget(terminal):
    widest = Cost(macs=1_000_000, params=100)
    budgets = [Budget((("macs", 500_000.0),)), Budget((("macs", 250_000.0),))]
    bar = DescentBar(widest, budgets)
    for macs, percent in ((1_000_001, 0), (1_000_000, 0), (625_000, 50), (200_000, 100)):
        step = Step(index=0, group="stem", width=3, loss=0.5, macs=macs, params=10, metric="macs", budget=5e5,
                    evaluations=1, limits={}, spent={"macs": macs})  # fmt: skip
        bar.show_step(step)
        assert bar.bar.n == percent
    bar.bar.close()
    shown = terminal.readouterr().err
    assert "stem -> 3, loss 0.5000, +100.0% to 0.50 million MACs" in shown
    assert "the last network is refined" in shown
