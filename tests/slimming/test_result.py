"""Results are values that a file gives back."""

import pickle
from dataclasses import replace

import pytest
import timm
import torch
from helpers.searches import LatencyFunction, held_out, make_supernet

from timm_autoslim import Conditions, SearchResult, baseline, convert, cost, cost_by_module, search

BUDGETS = ["macs<=60%", "params<=50% and macs<=40%"]


@pytest.fixture(scope="module")
def supernet():
    return make_supernet()


@pytest.fixture(scope="module")
def result(supernet):
    return search(supernet, BUDGETS, held_out(supernet))


def test_a_result_holds_all_that_a_report_shows(supernet, result):
    assert (result.method, result.budgets) == ("searched", ("macs<=60%", "params<=50% and macs<=40%"))
    assert result.names == ("macs-60pct-searched", "params-50pct-macs-40pct-searched")
    assert result.groups == supernet.space.groups
    assert result.widest == cost(supernet)
    assert result.macs_by_module == cost_by_module(supernet)
    assert result.images == 1 + 2 + 3 + 4
    assert result.settings == {"mode": "fast", "rank": "per_cost", "steps": 5, "refine": "units", "seed": 0}
    assert (result.base, result.seconds) == (None, None)
    for network in result.networks:
        assert network.cost == cost(supernet, network.widths)
        assert network.macs_by_module == cost_by_module(supernet, network.widths)


def test_groups_at_their_least_width_are_listed(supernet, result):
    network = result.networks[0]
    least = replace(network, widths=supernet.space.min())
    assert result.list_narrowest(least) == tuple(supernet.space.names)
    assert result.list_narrowest(replace(network, widths=supernet.space.max())) == ()
    name = supernet.space.names[1]
    one = supernet.space.max().replace(name, supernet.space[name].choices[0])
    assert result.list_narrowest(replace(network, widths=one)) == (name,)


def test_search_and_baselines_have_one_interface(supernet, result):
    uniform = baseline(supernet, BUDGETS, held_out(supernet), "uniform")
    assert (uniform.method, uniform.budgets, uniform.steps) == ("uniform", result.budgets, ())
    assert uniform.names == ("macs-60pct-uniform", "params-50pct-macs-40pct-uniform")
    assert (uniform.widest, uniform.groups) == (result.widest, result.groups)


@pytest.mark.parametrize("method", ["searched", "random", "uniform"])
def test_a_file_gives_back_what_was_saved(supernet, result, tmp_path, method):
    if method != "searched":
        result = baseline(supernet, BUDGETS, held_out(supernet), method, candidates=3)
    result = replace(result, seconds=1.5, base="<Branches>")
    path = tmp_path / "search" / f"{method}.json"
    result.save(path)
    loaded = SearchResult.load(str(path))
    assert loaded == result
    assert loaded.to_dict() == result.to_dict()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # widths are those of the supernet: it takes them
    for network, original in zip(loaded.networks, result.networks, strict=True):
        assert network.widths == original.widths
        assert hash(network.widths) == hash(original.widths)
        assert network.widths.groups == original.widths.groups
        assert supernet.space.check(network.widths) is network.widths


def test_costs_in_other_metrics_are_given_back_too(supernet, tmp_path):
    conditions = Conditions(batch_size=3, latency=LatencyFunction(lambda shares: 10 * sum(shares) + 0.125))
    budgets = ["latency_ms<=70% and peak_bytes<=90%"]
    result = search(supernet, budgets, held_out(supernet), conditions=conditions, steps=2)
    result.save(tmp_path / "x.json")
    loaded = SearchResult.load(tmp_path / "x.json")
    assert loaded == result
    assert loaded.networks[0].cost.peak_bytes == cost(supernet, result.networks[0].widths, batch_size=3).peak_bytes
    assert loaded.networks[0].cost.latency_ms == result.networks[0].cost.latency_ms
    assert loaded.widest.latency_ms == result.widest.latency_ms is not None


def test_the_name_of_the_model_and_every_kind_of_group_is_given_back(tmp_path):
    model = timm.create_model("resnet10t", num_classes=10)
    supernet = convert(model, torch.zeros(1, 3, 32, 32), min=0.3, divisor=4, choices={"layer1*": [7, 20]})
    result = baseline(supernet, {"params": 3_000_000}, lambda subnet: 0.25, "uniform")
    result.save(tmp_path / "x.json")
    assert SearchResult.load(tmp_path / "x.json") == result
    assert (result.base, result.budgets, result.images) == ("resnet10t", ("params<=3000000",), 0)


def test_a_result_can_be_hashed_and_sent_to_another_process(result):
    assert pickle.loads(pickle.dumps(result)) == result
    assert hash(pickle.loads(pickle.dumps(result))) == hash(result)


def test_a_file_is_written_whole_or_not_at_all(result, tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        result.save(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
