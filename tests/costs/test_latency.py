"""Latency tables: what one predicts, what its file holds, and what is refused."""

import json
import random
import re
import threading

import numpy as np
import pytest
import torch
from helpers.latencies import fake_times
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim import Conditions, LatencyTable, convert, cost, measure_latency, search
from timm_autoslim.costs import fit, latency
from timm_autoslim.costs.measure import name_device
from timm_autoslim.costs.tape import get_tape
from timm_autoslim.errors import ConfigError, LatencyError, WidthError
from timm_autoslim.utils.files import write_text


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    return convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))


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


@pytest.mark.slow
def test_real_operators_are_measured_and_add_up(supernet):
    table = LatencyTable(batch_size=64)
    narrow, wide = (table.predict(supernet, w) for w in (supernet.space.min(), supernet.space.max()))
    assert 0 < narrow < wide
    assert cost(supernet, latency=table).latency_ms == wide
    names = {key.partition("float")[0] for key in table.operators}
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
    again.predict(supernet, widths.replace("stem", widths["stem"] + 1))  # only what the stem touches is new
    assert 0 < len(measured) - done < len(get_tape(supernet).operators)
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_two_tables_share_a_file(supernet, monkeypatch, tmp_path):
    fake_times(monkeypatch)
    path = tmp_path / "table.json"
    one, other = LatencyTable(path), LatencyTable(path)
    one.predict(supernet, supernet.space.from_dict({"stem": 7, "inner": 11}))
    other.predict(supernet, supernet.space.from_dict({"stem": 9, "inner": 13}))
    assert len(LatencyTable(path)) == len(one.operators.keys() | other.operators.keys()) > len(one)


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
    table, predictions = LatencyTable(), {}
    for frozen in ("0", "4"):
        supernet = convert(model, torch.zeros(1, 3, 16, 16), freeze=frozen)
        widths = supernet.space.uniform(0.25)
        predictions[supernet.space.names, widths.values_] = table.predict(supernet, widths)
        assert LatencyTable().predict(supernet, widths) == predictions[supernet.space.names, widths.values_]
    assert len({values for _, values in predictions}) == 1 < len(set(predictions.values()))


@pytest.mark.slow
def test_random_numbers_are_left_alone(supernet, tmp_path):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    table, widths, before = LatencyTable(), supernet.space.uniform(0.4), state()
    table.predict(supernet, widths)
    table.report(supernet, [widths], rounds=1, repeats=1)
    measure_latency(supernet.extract(widths), supernet.example(2), repeats=1)
    conditions = Conditions(latency=table)
    search(supernet, {"latency_ms": "80%"}, lambda subnet: 1.0, conditions=conditions, steps=1, refine="none")
    assert state() == before


def test_tables_of_one_file_that_write_at_once_lose_nothing(supernet, monkeypatch, tmp_path):
    fake_times(monkeypatch)
    path, other = tmp_path / "latency.json", []
    first, second = LatencyTable(path), LatencyTable(path)

    def write(target, text):  # when the first has read the file and is about to write it, the second begins to write
        if not other:
            other.append(threading.Thread(target=second.add_up, args=(supernet, supernet.space.min())))
            other[0].start()
            other[0].join(0.3)
        write_text(target, text)

    get_tape(supernet)  # which takes long
    monkeypatch.setattr(latency, "write_text", write)
    first.add_up(supernet, supernet.space.max())
    other[0].join(30)
    assert LatencyTable(path).operators.keys() == {**first.operators, **second.operators}.keys()


@pytest.mark.parametrize(("key", "value"), [("device", "Another CPU"), ("threads", 7), ("torch", "1.0.0")])
def test_a_table_of_another_device_is_refused(supernet, monkeypatch, tmp_path, key, value):
    fake_times(monkeypatch)
    path = tmp_path / "table.json"
    LatencyTable(path).predict(supernet, supernet.space.max())
    content = json.loads(path.read_text())
    here = content[key]
    path.write_text(json.dumps({**content, key: value}))
    message = f"got a latency table that was measured with {key} {value!r}; needed: {key} {here!r}; give another path"
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
def test_a_table_of_impossible_times_is_refused(supernet, monkeypatch, tmp_path, part, value):
    fake_times(monkeypatch)
    path = tmp_path / "table.json"
    LatencyTable(path).predict(supernet, supernet.space.max())
    content = json.loads(path.read_text())
    key = next(iter(content[part]))
    content[part][key] = value if part == "operators" else [*content[part][key][:-1], value]
    path.write_text(json.dumps(content))
    message = re.escape(f"{path}: is no latency table (ValueError: {part}: got {value!r}, needed are numbers")
    with pytest.raises(LatencyError, match=message):
        LatencyTable(path)
    content[part][key] = [1.0, 2.0]
    path.write_text(json.dumps(content))
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
    with pytest.raises(WidthError, match="widths: got a dict"):
        table.predict(supernet, supernet.space.max().to_dict())
    with pytest.raises(ConfigError, match="got a TwoGroups; needed: a Supernet, as convert"):
        table.predict(supernet.model, supernet.space.max())
    with pytest.raises(ConfigError, match="got a TwoGroups; needed: a Supernet, as convert"):
        table.report(supernet.model, [supernet.space.max()])
    with pytest.raises(LatencyError, match=r"report\(\): got no subnets"):
        table.report(supernet, [])


def test_a_table_of_a_later_format_is_refused(tmp_path):
    path = tmp_path / "table.json"
    made_for = {"device": name_device("cpu"), "threads": 1, "torch": torch.__version__}
    path.write_text(json.dumps({"format": 4, **made_for, "operators": {}, "fits": {}}))
    with pytest.raises(LatencyError, match="got a latency table of format 4; needed: format 3"):
        LatencyTable(path)


@pytest.mark.slow
def test_a_table_measures_heavy_operators_where_they_run(supernet, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(fit, "ANCHORS", 4)
    table = LatencyTable(runtime="onnxruntime", batch_size=8)
    narrow, wide = (table.predict(supernet, w) for w in (supernet.space.min(), supernet.space.max()))
    assert 0 < narrow < wide
    inside = {key for key in table.operators if key.startswith(f"onnxruntime-{onnxruntime.__version__} aten.")}
    assert inside
    assert all("convolution" in key or "addmm" in key for key in inside)
    assert any(key.startswith("aten.relu") for key in table.operators)
