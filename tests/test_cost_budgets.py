"""recipes/search.py with budgets of memory and latency, on one tiny run."""

import json
import re

import pytest
import search
from recipe_tools import trained, write_config
from test_latency import fake_times

from timm_autoslim.errors import ConfigError, LatencyError


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


def test_several_processes_cannot_share_a_latency(folder):
    class Pair:
        num_processes = 2

    args = search.parse_args("search", None, [str(folder)])
    assert search.conditions(args, ["macs<=50%"], Pair).batch_size == 1
    with pytest.raises(ConfigError, match="--budgets with latency_ms: one process is needed"):
        search.conditions(args, ["macs<=50% and latency_ms<=3"], Pair)
