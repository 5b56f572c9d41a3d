"""Latency: what is measured, what a table predicts from it, and what is refused."""

import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.latencies import fake_times
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim import Conditions, LatencyTable, baseline, convert, cost, measure_latency, search
from timm_autoslim.costs import latency as room
from timm_autoslim.costs import measure as stopwatch
from timm_autoslim.costs import onnxruntime as kernels
from timm_autoslim.costs.latency import LatencyReport, anchors, fit_factors
from timm_autoslim.costs.measure import device_name, measure_in_turns
from timm_autoslim.costs.onnxruntime import onnxruntime_ms
from timm_autoslim.errors import BudgetError, ConfigError, LatencyError, WidthError
from timm_autoslim.slimming.budgets import read_budgets


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    return convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))


# -- measuring --------------------------------------------------------------------------------------------------------


class Sleeping(nn.Module):
    """Takes ten times as long for ten times the layers, without a word about how long one takes."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers)))

    def forward(self, x):
        return self.layers(x)


def test_a_model_of_twenty_layers_takes_longer_than_one_of_one():
    short, long = (measure_latency(Sleeping(n), torch.randn(64, 256)) for n in (1, 20))
    assert 0 < 4 * short < long


def test_measuring_leaves_model_and_threads_alone():
    model = TwoGroups().train()
    before, threads = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_num_threads()
    assert measure_latency(model, torch.randn(2, 3, 8, 8), threads=2, dtype=torch.float64, repeats=2) > 0
    assert model.training
    assert torch.get_num_threads() == threads
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items())


def test_onnxruntime_runs_the_same_model():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert measure_latency(TwoGroups(), torch.randn(2, 3, 8, 8), runtime="onnxruntime", repeats=3) > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_model_is_measured():
    assert measure_latency(nn.Linear(4, 4), torch.randn(2, 4), runtime="compile", repeats=3) > 0


def test_every_compiled_model_runs_compiled(monkeypatch):
    """torch.compile runs the ninth model of a class in eager mode by default, for all share the class's code."""
    compiled, plain = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: plain(model, backend=lambda graph, _: compiled.append(1) or graph)
    )
    torch.compiler.reset()
    models = [TwoGroups(n) for n in range(8, 20)]
    assert len(measure_in_turns(models, torch.randn(2, 3, 8, 8), runtime="compile", rounds=2, repeats=1)) == len(models)
    assert len(compiled) == len(models)


class Named(nn.Module):
    """Notes each of its runs."""

    def __init__(self, name, runs):
        super().__init__()
        self.name, self.runs = name, runs

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.runs.append(self.name)
        return x


def test_models_are_measured_in_turns_and_the_median_turn_counts(monkeypatch):
    runs, times = [], iter([1.0, 3.0, 5.0, 70.0, 20.0, 9.0, 2.0, 4.0, 7.0])

    def timed(run, *_):
        run()
        return next(times)

    monkeypatch.setattr(stopwatch, "timed", timed)
    models = (Named(name, runs) for name in "abc")
    assert measure_in_turns(models, torch.ones(1), rounds=3, repeats=2) == [2.0, 4.0, 7.0]
    assert runs == list("abc" * 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "gpu"}, "got the device 'gpu', which cannot be used here"),
        ({"device": "cuda:77"}, "got the device 'cuda:77', which cannot be used here"),
        ({"device": "meta"}, "got the device 'meta', on which nothing is computed"),
        ({"runtime": "tensorrt"}, "got runtime='tensorrt'; needed: one of ['eager', 'compile', 'onnxruntime']"),
        ({"device": None}, "got the device 'None', which cannot be used here"),
        ({"threads": 0}, "threads: got 0; needed: a positive integer"),
        ({"threads": True}, "threads: got True; needed: a positive integer"),
        ({"dtype": torch.int8}, "got dtype=torch.int8; needed: a floating point type"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, message):
    with pytest.raises(LatencyError, match=re.escape(message)):
        measure_latency(TwoGroups(), torch.randn(2, 3, 8, 8), **given)
    with pytest.raises(LatencyError, match=re.escape(message)):
        LatencyTable(**given)


@pytest.mark.parametrize(
    ("model", "inputs", "given", "message"),
    [
        (TwoGroups(), torch.zeros(1, 3, 8, 8), {"repeats": 0}, "repeats: got 0; needed: a positive integer"),
        (TwoGroups(), torch.zeros(1, 3, 8, 8), {"repeats": "3"}, "repeats: got '3'; needed: a positive integer"),
        (None, torch.zeros(1, 3, 8, 8), {}, "the model: got a NoneType; needed: a plain nn.Module"),
        (
            TwoGroups(),
            torch.zeros(1, 5, 8, 8),
            {},
            "the model: cannot run as runtime='eager' (RuntimeError: Given",
        ),
    ],
)
def test_a_measurement_that_cannot_be_made_is_refused(model, inputs, given, message):
    with pytest.raises(LatencyError, match=re.escape(message)):
        measure_latency(model, inputs, **given)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = TwoGroups()
    with pytest.raises(LatencyError, match="the model has no weights"):
        measure_latency(model, torch.randn(2, 3, 8, 8))


# -- the table --------------------------------------------------------------------------------------------------------


def test_a_table_predicts_sums_of_operators(supernet, monkeypatch):
    fake_times(monkeypatch)
    table = LatencyTable()
    for widths in (supernet.space.sample(torch.Generator().manual_seed(seed)) for seed in range(5)):
        assert [table.predict(supernet, widths)] == pytest.approx(table.measure(supernet, [widths]), rel=1e-6)
    report = table.report(supernet, [supernet.space.uniform(r) for r in (0.2, 0.4, 0.6, 0.9)])
    assert report.median_error < 1e-6
    assert report.rank_correlation == pytest.approx(1)


def test_a_report_fits_anew_what_it_measures(supernet, monkeypatch):
    fake_times(monkeypatch)
    table, subnets = LatencyTable(), [supernet.space.uniform(r) for r in (0.2, 0.4, 0.6, 0.9)]
    before = [table.predict(supernet, widths) for widths in subnets]
    with monkeypatch.context() as slower:
        fake_times(slower, python=4.0, factor=3.0)  # the machine takes twice as long as before
        report = table.report(supernet, subnets)
    assert report.median_error < 1e-6
    assert report.measured_ms == pytest.approx([2 * ms for ms in before])
    assert [table.predict(supernet, widths) for widths in subnets] == list(report.predicted_ms)


def test_real_operators_are_measured_and_add_up(supernet):
    table = LatencyTable(batch_size=64)
    narrow, wide = (table.predict(supernet, w) for w in (supernet.space.min(), supernet.space.max()))
    assert 0 < narrow < wide
    assert cost(supernet, latency=table).latency_ms == wide
    names = {key.partition("float")[0] for key in table._operators}
    assert {"aten.convolution.default(", "aten.addmm.default("} <= names
    assert not any("view" in name or "aten.t." in name for name in names)


def test_a_table_measures_nothing_twice(supernet, monkeypatch, tmp_path):
    measured = fake_times(monkeypatch)
    path = tmp_path / "new" / "table.json"
    table = LatencyTable(path)
    widths = supernet.space.uniform(0.4)
    first = table.predict(supernet, widths)
    done = len(measured)
    assert table.predict(supernet, widths) == first
    again = LatencyTable(path)
    assert len(again) == len(table) == len(set(map(str, measured)))
    assert again.predict(supernet, widths) == first
    assert len(measured) == done
    again.predict(supernet, widths.replaced("stem", widths["stem"] + 1))  # only what the stem touches is new
    assert 0 < len(measured) - done < len(again._named(supernet, widths))
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_two_tables_share_a_file(supernet, monkeypatch, tmp_path):
    fake_times(monkeypatch)
    path = tmp_path / "table.json"
    one, other = LatencyTable(path), LatencyTable(path)
    one.predict(supernet, supernet.space.from_dict({"stem": 7, "inner": 11}))
    other.predict(supernet, supernet.space.from_dict({"stem": 9, "inner": 13}))
    assert len(LatencyTable(path)) == len(one._operators.keys() | other._operators.keys()) > len(one)


def test_a_table_that_cannot_be_written_leaves_the_old_one(supernet, monkeypatch, tmp_path):
    fake_times(monkeypatch)
    path = tmp_path / "table.json"
    LatencyTable(path).predict(supernet, supernet.space.max())
    before = path.read_bytes()

    def refused(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refused)
    with pytest.raises(OSError, match="disk full"):
        LatencyTable(path).predict(supernet, supernet.space.from_dict({"stem": 7, "inner": 11}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_two_spaces_of_one_model_keep_their_predictions_apart(monkeypatch):
    fake_times(monkeypatch)
    convs = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, stride=4)
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    table, found = LatencyTable(), {}
    for frozen in ("0", "4"):
        supernet = convert(model, torch.zeros(1, 3, 16, 16), freeze=frozen)
        widths = supernet.space.uniform(0.25)
        found[supernet.space.names, widths.values_] = table.predict(supernet, widths)
        assert LatencyTable().predict(supernet, widths) == found[supernet.space.names, widths.values_]
    assert len({values for _, values in found}) == 1 < len(set(found.values()))


def test_random_numbers_are_left_alone(supernet, tmp_path):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    table, widths, before = LatencyTable(), supernet.space.uniform(0.4), state()
    supernet.conditions = Conditions(latency=table)
    table.predict(supernet, widths)
    table.report(supernet, [widths], rounds=1, repeats=1)
    measure_latency(supernet.extract(widths), supernet.example(2), repeats=1)
    search(supernet, {"latency_ms": "80%"}, lambda subnet: 1.0, steps=1, refine="none")
    assert state() == before


@pytest.mark.parametrize(("key", "value"), [("device", "Another CPU"), ("threads", 7), ("torch", "1.0.0")])
def test_a_table_of_another_device_is_refused(supernet, monkeypatch, tmp_path, key, value):
    fake_times(monkeypatch)
    path = tmp_path / "table.json"
    LatencyTable(path).predict(supernet, supernet.space.max())
    found = json.loads(path.read_text())
    here = found[key]
    path.write_text(json.dumps({**found, key: value}))
    message = f"this latency table was measured with {key} {value!r}, and asked for is {here!r}; give another path"
    with pytest.raises(LatencyError, match=re.escape(message)):
        LatencyTable(path)
    assert json.loads(path.read_text())[key] == value


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 3, "device": "x"}', "\x00"])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(LatencyError, match="is no latency table"):
        LatencyTable(path)
    assert path.read_text() == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -5.0, None, "3", True])
@pytest.mark.parametrize("part", ["operators", "fits"])
def test_a_table_of_times_that_no_clock_gives_is_refused(supernet, monkeypatch, tmp_path, part, value):
    fake_times(monkeypatch)
    path = tmp_path / "table.json"
    LatencyTable(path).predict(supernet, supernet.space.max())
    found = json.loads(path.read_text())
    key = next(iter(found[part]))
    found[part][key] = value if part == "operators" else [*found[part][key][:-1], value]
    path.write_text(json.dumps(found))
    message = re.escape(f"{path}: is no latency table (ValueError: {part}: got {value!r}, needed are numbers")
    with pytest.raises(LatencyError, match=message):
        LatencyTable(path)
    found[part][key] = [1.0, 2.0]
    path.write_text(json.dumps(found))
    with pytest.raises(LatencyError, match="is no latency table"):
        LatencyTable(path)


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LatencyError, match=r"table\.json: this latency table cannot be written in .*file"):
        LatencyTable(tmp_path / "file" / "table.json")


def test_a_table_refuses_what_is_no_subnet(supernet, monkeypatch):
    fake_times(monkeypatch)
    table = LatencyTable()
    with pytest.raises(WidthError, match="got widths of another model"):
        table.predict(supernet, convert(TwoGroups(16), torch.zeros(1, 3, 8, 8)).space.max())
    with pytest.raises(WidthError, match="got widths of type dict"):
        table.predict(supernet, supernet.space.max().to_dict())
    with pytest.raises(ConfigError, match="got a TwoGroups; needed: a Supernet, as convert"):
        table.predict(supernet.model, supernet.space.max())
    with pytest.raises(ConfigError, match="got a TwoGroups; needed: a Supernet, as convert"):
        table.report(supernet.model, [supernet.space.max()])
    with pytest.raises(LatencyError, match=r"report\(\) got no subnets"):
        table.report(supernet, [])


def test_a_table_of_a_later_format_is_refused(tmp_path):
    path = tmp_path / "table.json"
    made_for = {"device": device_name("cpu"), "threads": 1, "torch": torch.__version__}
    path.write_text(json.dumps({"format": 4, **made_for, "operators": {}, "fits": {}}))
    with pytest.raises(LatencyError, match="got a latency table of format 4; needed: format 3"):
        LatencyTable(path)


def test_an_operator_that_cannot_be_measured_is_named(supernet):
    table = LatencyTable()
    broken = room.Operator("aten.mm.default", "head", (room.TensorSpec(torch.float32, (2, 3), (0, 1)),) * 2, {})
    with pytest.raises(LatencyError, match=r"head: aten\.mm\.default cannot be measured by itself \(RuntimeError"):
        table._measured(broken)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten.convolution.default", ((2, 16, 9, 9), (24, 8, 3, 3), (24,), (2, 2), (1, 1), (1, 1), False, (0, 0), 2)),
        ("aten.convolution.default", ((2, 16, 9, 9), (16, 24, 2, 2), None, (2, 2), (0, 0), (1, 1), True, (1, 1), 1)),
        ("aten.convolution.default", ((2, 16, 9), (8, 16, 3), None, (1,), (1,), (1,), False, (0,), 1)),
        ("aten.addmm.default", ((8,), (4, 16), (16, 8))),
        ("aten.mm.default", ((4, 16), (16, 8))),
        ("aten.bmm.default", ((3, 4, 16), (3, 16, 8))),
        ("scaled_dot_product_attention", ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6))),
    ],
)
def test_onnxruntime_runs_single_operators(name, args):
    """Shapes of tensors come first, as tuples in the place of specifications."""
    onnxruntime = pytest.importorskip("onnxruntime")
    tensors = 3 if name != "aten.mm.default" and name != "aten.bmm.default" else 2
    specs = [a and room.TensorSpec(torch.float32, a, tuple(range(len(a)))) for a in args[:tensors]]
    operator = room.Operator(name, "", (*specs, *args[tensors:]), {})
    assert 0 < onnxruntime_ms(operator, 1) < 1000
    half = [s and replace(s, dtype=torch.bfloat16) for s in specs]
    assert onnxruntime_ms(replace(operator, args=(*half, *args[tensors:])), 1) is None
    # what runs is the operator: its result has the shape that torch's has
    graph = kernels._graph(operator)
    made = [s and torch.ones(s.shape) for s in specs]
    wanted = room._resolve(name)(*made, *args[tensors:]).shape
    session = onnxruntime.InferenceSession(graph.model, providers=["CPUExecutionProvider"])
    assert session.run(None, graph.feed)[0].shape == wanted


def test_a_table_measures_heavy_operators_where_they_run(supernet, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(room, "ANCHORS", 4)
    table = LatencyTable(runtime="onnxruntime", batch_size=8)
    narrow, wide = (table.predict(supernet, w) for w in (supernet.space.min(), supernet.space.max()))
    assert 0 < narrow < wide
    inside = {key for key in table._operators if key.startswith(f"onnxruntime-{onnxruntime.__version__} aten.")}
    assert inside
    assert all("convolution" in key or "addmm" in key for key in inside)
    assert any(key.startswith("aten.relu") for key in table._operators)


# -- fitting ----------------------------------------------------------------------------------------------------------


def test_factors_are_found_again_and_never_negative():
    rng = np.random.default_rng(0)
    rows = np.column_stack([np.ones(8), rng.uniform(1, 9, 8), rng.uniform(1, 9, 8)])
    assert fit_factors(rows, rows @ [0.5, 1.2, 0.8]) == pytest.approx([0.5, 1.2, 0.8])
    found = fit_factors(rows, rows @ [0.0, 2.0, -0.1])
    assert min(found) == 0 < found[1]


def test_a_report_gives_errors_and_ranks():
    report = LatencyReport((), (1.0, 2.0, 4.0), (1.1, 2.0, 3.0))
    assert report.errors == pytest.approx((0.1, 0.0, 0.25))
    assert report.median_error == pytest.approx(0.1)
    assert report.rank_correlation == pytest.approx(1)
    assert LatencyReport((), (1.0, 2.0, 4.0), (3.0, 2.0, 1.0)).rank_correlation == pytest.approx(-1)


def test_anchors_are_different_subnets(supernet):
    found = anchors(supernet)
    assert len(found) == len(set(found)) == room.ANCHORS


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["search", "uniform", "random"])
def test_a_search_keeps_a_budget_of_latency_and_macs(supernet, monkeypatch, method):
    fake_times(monkeypatch)
    supernet.conditions = Conditions(latency=LatencyTable())
    whole = cost(supernet)
    budgets = ["macs<=70% and latency_ms<=80%", f"latency_ms<={0.9 * whole.latency_ms}"]
    if method == "search":
        result = search(supernet, budgets, lambda subnet: 1.0)
    else:
        result = baseline(supernet, budgets, lambda subnet: 1.0, method, candidates=3)
    first, second = result.networks
    assert first.cost.latency_ms <= 0.9 * whole.latency_ms
    assert second.cost.latency_ms <= 0.8 * whole.latency_ms
    assert second.cost.macs <= 0.7 * whole.macs
    assert second.cost.latency_ms > 0.75 * whole.latency_ms or second.cost.macs > 0.6 * whole.macs


def test_a_budget_of_latency_needs_a_table(supernet):
    with pytest.raises(BudgetError, match="latency_ms is known only for a named device; needed: a LatencyTable"):
        search(supernet, ["macs<=50% and latency_ms<=8"], lambda subnet: 1.0)


class Says:
    def __init__(self, value):
        self.value = value

    def predict(self, supernet, widths):
        return self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, None, "3"])
@pytest.mark.parametrize("budget", ["50%", "0.001"])
def test_a_latency_that_is_no_time_is_refused(supernet, value, budget):
    supernet.conditions = Conditions(latency=Says(value))
    message = rf"Says\.predict: got {value!r} at the widths \{{'stem': 32.*; needed: a positive number of milliseconds"
    with pytest.raises(LatencyError, match=message):
        search(supernet, {"latency_ms": budget}, lambda subnet: 1.0)
    assert cost(supernet, latency=Says(np.float32(2))).latency_ms == 2
    with pytest.raises(BudgetError, match=r"got latency='t\.json'; needed: what predicts"):
        cost(supernet, latency="t.json")


def test_a_budget_of_latency_out_of_reach_is_refused(supernet, monkeypatch):
    fake_times(monkeypatch)
    supernet.conditions = Conditions(latency=LatencyTable())
    with pytest.raises(BudgetError, match=r"the budget of 0\.500 latency_ms is out of reach: the narrowest subnet"):
        read_budgets(supernet, {"latency_ms": 0.5})
