"""Results are values that a file gives back; a broken file is refused as a widest."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from helpers.searches import LatencyFunction, held_out, make_supernet
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_autoslim import Budget, Conditions, SearchResult, baseline, convert, cost, cost_by_module, search
from timm_autoslim.errors import ArtifactError, BudgetError
from timm_autoslim.slimming.goals import Goal
from timm_autoslim.slimming.result import Found

BUDGETS = ["macs<=60%", "params<=50% and macs<=40%"]


@pytest.fixture(scope="module")
def supernet():
    return make_supernet()


@pytest.fixture(scope="module")
def result(supernet):
    return search(supernet, BUDGETS, held_out(supernet))


@pytest.fixture(scope="module")
def content(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("result") / "searched.json"
    result.save(path)
    return json.loads(path.read_text())


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


# -- broken and foreign files -----------------------------------------------------------------------------------------


def change(content, path, value):
    """Return a copy with another value at a path; `...` takes the part out."""
    content = copy.deepcopy(content)
    *above, last = path
    parent = content
    for key in above:
        parent = parent[key]
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 2, r"\.format: got 2; needed: format 1, of a file that SearchResult\.save wrote"),
        (["format"], ..., r"\.format: got None; needed: format 1"),
        (["networks"], [], r"\.networks: got \[\]; needed: at least one network"),
        (["networks"], {}, r"\.networks: got \{\}; needed: a list"),
        (["networks", 0, "loss"], "low", r"\.networks\[0\]\.loss: got 'low'; needed: a finite number"),
        (["networks", 0, "loss"], ..., r"\.networks\[0\]: got no 'loss'; needed: the keys"),
        (["networks", 1, "cost", "macs"], 1.5, r"\.networks\[1\]\.cost\.macs: got 1\.5; needed: an integer"),
        (["networks", 0, "cost", "joules"], 5, r"\.cost: got an unknown 'joules'"),
        (["networks", 0, "widths", "a"], 17, r"\.widths: a: got the width 17; needed: an integer from 1 to 16"),
        (["networks", 0, "widths", "a"], ..., r"\.widths: got no 'a'"),
        (["networks", 0, "widths", "z"], 1, r"\.widths: got an unknown 'z'"),
        (["networks", 0, "limits"], {}, r"\.limits: got \{\}; needed: limits in metrics of the cost"),
        (["networks", 0, "limits"], {"macs": 0}, r"\.limits\.macs: got 0; needed: a finite number above 0"),
        (["networks", 0, "limits"], {"latency_ms": 5}, r"\.limits: got .*; needed: limits in metrics of the cost"),
        (["networks", 0, "metric"], "params", r"\.metric: got 'params'; needed: one of \['macs'\]"),
        (["networks", 0, "macs_by_module", "a"], None, r"\.macs_by_module\.a: got None; needed: an integer"),
        (["groups"], [], r"\.groups: got \[\]; needed: at least one group"),
        (["groups", 0, "size"], 0, r"\.groups\[0\]\.size: got 0; needed: an integer from 1 on"),
        (["groups", 1, "name"], "a", r"\.groups: got .*; needed: at least one group, each with another name"),
        (["groups", 0, "choices"], [2, "4"], r"\.choices\[1\]: got '4'; needed: an integer"),
        (["steps", 0, "group"], "z", r"\.steps\[0\]\.group: got 'z'; needed: the name of a group"),
        (["steps", 0, "spent"], {"flops": 5}, r"\.spent: got an unknown 'flops'"),
        (["steps", 0, "metric"], "flops", r"\.metric: got 'flops'; needed: one of"),
        (["settings", "seed"], [1], r"\.settings\.seed: got \[1\]; needed: a text, a number"),
        (["settings"], [], r"\.settings: got \[\]; needed: an object"),
        (["base"], 5, r"\.base: got 5; needed: a text"),
        (["seconds"], "long", r"\.seconds: got 'long'; needed: a finite number"),
        (["widest"], {"macs": 5}, r"\.widest: got no 'params'"),
        (["evaluations"], -1, r"\.evaluations: got -1; needed: an integer from 0 on"),
        (["method"], None, r"\.method: got None; needed: a text"),
        (["note"], "mine", r"got an unknown 'note'"),
    ],
)
def test_a_broken_file_is_refused_by_what_is_wrong(content, tmp_path, path, value, message):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(change(content, path, value)))
    with pytest.raises(ArtifactError, match=r"x\.json.*" + message):
        SearchResult.load(file)


def parts(value, path=()):
    """Return the paths of all parts of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, part in items for p in ((*path, key), *parts(part, (*path, key)))]


junk = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_stands_in_a_file_it_is_loaded_whole_or_refused(content, tmp_path_factory, data):
    place = data.draw(st.sampled_from(parts(content)))
    file = tmp_path_factory.getbasetemp() / "junk.json"
    file.write_text(json.dumps(change(content, place, data.draw(st.one_of(st.just(...), junk)))))
    try:
        loaded = SearchResult.load(file)
    except ArtifactError:
        return
    loaded.save(file)
    assert SearchResult.load(file) == loaded


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "null", '{"networks": [1]}', "\x00"])
def test_another_file_is_refused(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=r"x\.json.*needed: (an object|.*SearchResult\.save wrote)"):
        SearchResult.load(file)


# -- networks ---------------------------------------------------------------------------------------------------------


class Rising:
    """Predicts more at every call."""

    def __init__(self):
        self.milliseconds = 0.0

    def predict(self, supernet, widths):
        self.milliseconds += 1
        return self.milliseconds


def test_a_network_over_budget_is_never_returned(supernet):
    widths = supernet.space.uniform(0.5)
    spent = cost(supernet, widths)
    network = Found.of("searched", Goal(supernet, Budget((("macs", float(spent.macs)), ("params", 1e9)))), widths, 0.5)
    assert (network.metric, network.budget, network.cost) == ("macs", spent.macs, spent)
    with pytest.raises(BudgetError, match=rf"the network: got {spent.macs:,} macs, where it was at most 100\.0 before"):
        Found.of("searched", Goal(supernet, Budget((("macs", 100.0),))), widths, 0.5)
    with pytest.raises(BudgetError, match="needed: the same latency_ms for the same widths at every prediction"):
        search(supernet, {"latency_ms": 6}, held_out(supernet), conditions=Conditions(latency=Rising()))
