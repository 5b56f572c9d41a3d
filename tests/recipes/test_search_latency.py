"""recipes/search.py with budgets of memory and latency, on one tiny run."""

import json
import re
import shutil

import pytest
import search
from helpers.latencies import fake_times
from helpers.recipes import RECIPES, launch_two, trained, write_config

from timm_autoslim.errors import LatencyError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("costs"), "run")


def searched(folder, *argv):
    search.main([str(folder), "-c", write_config(folder.parent), *argv])
    return json.loads((folder / "search.json").read_text())


def test_budgets_of_memory_and_latency(folder, monkeypatch, capsys):
    measured = fake_times(monkeypatch)
    argv = ["--budgets", "peak_bytes=80%", "macs<=70% and latency_ms<=90%", "--cost-batch-size", "4", "--baselines"]
    content = searched(folder, *argv)
    memory, both = content["networks"]
    assert memory["peak_bytes"] <= memory["limits"]["peak_bytes"]
    assert both["latency_ms"] <= both["limits"]["latency_ms"]
    assert both["macs"] <= both["limits"]["macs"]
    assert both["name"] == "macs-70pct-latency_ms-90pct-searched"
    printed = capsys.readouterr().out
    assert re.search(r"^budget peak_bytes<=80%: at most \d\.\d{3}M peak_bytes; within reach$", printed, re.MULTILINE)
    assert re.search(r"^macs-70pct-latency_ms-90pct-searched .* \d+\.\d{3} latency_ms  loss", printed, re.MULTILINE)
    assert len(json.loads((folder / "latency.json").read_text())["operators"]) == len(measured)
    with pytest.raises(LatencyError, match="cannot be used here"):
        searched(folder, *argv, "--latency-device", "gpu")


def test_two_processes_go_by_the_times_that_one_measures(folder, monkeypatch, tmp_path):
    fake_times(monkeypatch, python=0.0)
    argv = ["--budgets", "latency_ms=70%", "macs<=70% and latency_ms<=80%"]
    one = searched(folder, *argv)  # measures what a search meets, so that the second can know it
    two = shutil.copytree(folder, tmp_path / "two")
    (two / "search.json").unlink()
    done = launch_two(str(RECIPES / "search.py"), str(two), "-c", write_config(tmp_path), *argv)
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    assert (two / "latency.json").read_bytes() == (folder / "latency.json").read_bytes()
    found = json.loads((two / "search.json").read_text())
    assert {**found, "seconds": 0} == {**one, "seconds": 0}
