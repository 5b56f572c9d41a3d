"""The table of docs/howto/devices.md: what it is made of, and that the page shows the rows that are committed."""

import json
from pathlib import Path

import pytest

from timm_autoslim.recipes.benchmarks import devices

DOCS = Path(__file__).parents[3] / "docs"
ROW = {"model": "a", "runtime": "eager", "widths": ["16", "any"], "macs": [0.5, 0.5],
       "milliseconds": [[10.0, 10.0, 20.0], [5.0, 6.0, 5.0], [11.0, 12.0, 13.0]]}  # fmt: skip


def test_ratios_are_to_the_original_and_what_is_slower_stands_out():
    assert devices.compute_ratios(ROW) == [0.5, 1.2]
    other = ROW | {"runtime": "onnxruntime", "milliseconds": [[4.0] * 3, [1.0] * 3, [2.0] * 3]}
    lines = devices.make_table([ROW, other]).splitlines()
    assert lines[2:4] == ["| a | 16 | 0.50 | 0.50 | 0.25 |", "|  | any | 0.50 | **1.20** | 0.50 |"]
    assert "and 0.00 in ONNX Runtime of these." in lines[-1]
    assert devices.make_table([ROW]).splitlines()[2] == "| a | 16 | 0.50 | 0.50 |"


def test_the_page_shows_the_committed_rows():
    rows = [json.loads(line) for line in (DOCS / "results" / "devices.jsonl").read_text().splitlines()]
    assert devices.make_table(rows) in (DOCS / "howto" / "devices.md").read_text()
    assert {(row["model"], row["runtime"]) for row in rows} == {(m, r) for m in devices.MODELS for r in devices.LABELS}


@pytest.mark.slow
def test_a_model_is_measured_in_turns(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    command = ["devices.py", "--results", str(path), "--models", "resnet10t", "--runtimes", "eager", "--img-size",
               "32", "--turns", "3", "--repeats", "1"]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    for _ in range(2):  # the second has nothing left to do
        devices.main()
    (row,) = map(json.loads, path.read_text().splitlines())
    assert [len(times) for times in row["milliseconds"]] == [3] * 5
    assert all(macs <= share for macs, share in zip(row["macs"], (0.75, 0.5, 0.25, 0.5), strict=True))
    assert "| resnet10t | 16 | " in capsys.readouterr().out
