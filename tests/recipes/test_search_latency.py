"""recipes/search.py with budgets of memory and latency, on one tiny run."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from helpers.latencies import fake_times
from helpers.recipes import RECIPES, launch_two, run_train, write_config

from timm_autoslim import SearchResult
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes import search
from timm_autoslim.recipes.lib.networks import read_networks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_train(tmp_path_factory.mktemp("costs"), "run")


def run_search(folder, *argv):
    shutil.rmtree(folder / "search", ignore_errors=True)  # of an earlier search
    search.main([str(folder), "-c", write_config(folder.parent), *argv])
    return SearchResult.load(folder / "search" / "searched.json")


@pytest.mark.slow
def test_budgets_of_memory_and_latency(folder, monkeypatch, capsys):
    measured = fake_times(monkeypatch)
    argv = ["--budgets", "peak_bytes=80%", "macs<=70% and latency_ms<=90%", "--cost-batch-size", "4", "--baselines"]
    memory, both = run_search(folder, *argv).networks
    assert memory.cost.peak_bytes <= memory.limits["peak_bytes"]
    assert both.cost.latency_ms <= both.limits["latency_ms"]
    assert both.cost.macs <= both.limits["macs"]
    assert list(read_networks(folder)) == ["peak_bytes-80pct-searched", "macs-70pct-latency_ms-90pct-searched"]
    printed = capsys.readouterr().out
    assert re.search(r"^budget peak_bytes<=80%: at most \d\.\d{3} megabytes; within reach$", printed, re.MULTILINE)
    assert re.search(r"^macs-70pct-latency_ms-90pct-searched .* \d+\.\d{3} milliseconds  loss", printed, re.MULTILINE)
    assert len(json.loads((folder / "latency.json").read_text())["operators"]) == len(measured)
    with pytest.raises(ConfigError, match=r"--latency-device gpu: .*cannot be used here"):
        run_search(folder, *argv, "--latency-device", "gpu")


@pytest.mark.slow
def test_two_processes_go_by_the_times_that_one_measures(folder, monkeypatch, tmp_path):
    fake_times(monkeypatch, python=0.0)
    argv = ["--budgets", "latency_ms=70%", "macs<=70% and latency_ms<=80%"]
    one = run_search(folder, *argv)  # measures what a search meets, so that the second can know it
    two = shutil.copytree(folder, tmp_path / "two")
    shutil.rmtree(two / "search")
    done = launch_two(str(RECIPES / "search.py"), str(two), "-c", write_config(tmp_path), *argv)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu" in done.stdout
    assert (two / "latency.json").read_bytes() == (folder / "latency.json").read_bytes()
    assert replace(SearchResult.load(two / "search" / "searched.json"), seconds=one.seconds) == one
