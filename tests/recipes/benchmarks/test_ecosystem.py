"""The sweep over other packages: on a package of small models of our own, and its table."""

import json
import sys
import types

import pytest
import torch
from helpers.recipes import RECIPES, launch
from torch import nn

from timm_autoslim.recipes.benchmarks import ecosystem
from timm_autoslim.recipes.benchmarks.lib import ecosystem as packages
from timm_autoslim.recipes.benchmarks.lib.ecosystem import PACKAGES, Package


class Reader(nn.Module):
    """A model that no trace can follow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = self.layer(x)
        return x * 2 if x.sum().item() > 0 else x


class Changing(nn.Module):
    """A model that is another one after its first forward."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.runs = make_mlp()[0], nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2)), 0

    def forward(self, x):
        x = self.first(x)
        x = self.last(x) if self.runs else x
        self.runs += 1
        return x


def make_mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(1, 4)


@pytest.fixture
def shapes(monkeypatch):
    """A package of three models."""
    module = types.ModuleType("shapes")
    module.MODELS = {
        "mlp": make_mlp,
        "reader": lambda: (Reader(), torch.rand(1, 4)),
        "changing": lambda: (Changing(), torch.rand(1, 4)),
    }
    monkeypatch.setitem(sys.modules, f"{packages.__name__}.shapes", module)
    monkeypatch.setitem(PACKAGES, "timm", Package("timm", "shapes"))  # an installed one, for its version


def test_a_model_has_a_row(shapes):
    row = ecosystem.measure("timm: mlp")
    assert row["equal"] == ""
    assert row["same"]
    assert row["half"] == row["half_after"] == 0.5
    assert row["groups"] == 1


def test_what_does_not_convert_or_changes_is_told(shapes):
    row = ecosystem.measure("timm: reader")
    assert row["error"].startswith("TraceError")
    assert row["error_after"].startswith("TraceError")
    assert not ecosystem.measure("timm: changing")["same"]


def test_outputs_are_compared_bit_for_bit():
    a = [torch.tensor([1.0, float("nan")])]
    assert ecosystem.same(a, [a[0].clone()])
    assert not ecosystem.same(a, [a[0] + 1e-7])
    assert not ecosystem.same(a, [a[0][:1]])
    assert not ecosystem.same([], [])


def test_the_table_has_packages_faults_and_totals():
    good = {"params": 1000, "groups": 2, "half": 0.3, "half_after": 0.3, "seconds": 1.0, "obstacles": [], "same": True,
            "equal": "", "version": "1.0"}  # fmt: skip
    rows = [
        {"name": "a: one", **good},
        {
            "name": "a: two",
            **good,
            "half": 0.6,
            "half_of_results": 0.4,
            "obstacles": [["an | output", 0.5]],
            "same": False,
        },
        {"name": "a: three", **good, "equal": "half and its extracted model"},
        {"name": "b: four", "params": 5, "version": "2.0", "error": "TraceError: no", "error_after": "TraceError: no"},
    ]
    text = ecosystem.make_table(rows, ["c"])
    assert "- 3 of 4 models convert as built and after a forward (75%), 2 (50%) with the same" in text
    assert "at most 0.35 in 2 of 3 (67%)" in text
    assert "bit for bit, in 2; 0 give other outputs each time they are called, and 1 differ." in text
    assert "| a | 1.0 | 3 | 3 | 0.300 |" in text
    assert "| b | 2.0 | 1 | 0 |  |" in text
    assert "| c | not installed | | | |" in text
    line = (
        "| a: two | 0.0M | 2 | 0.600 | 0.400 | 1.0 | equal | another search space after a forward (0.300); an / output"
    )
    assert f"{line} (0.50) |" in text
    assert "| a: one | 0.0M | 2 | 0.300 |  | 1.0 | equal |  |" in text
    assert "| b: four | 0.0M | | | | | | TraceError: no |" in text


@pytest.mark.slow
def test_a_sweep_goes_on_and_writes_its_page(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    page.write_text("<!-- ecosystem -->\n<!-- /ecosystem -->\n")
    row = {"name": "torchvision: raft_small", "version": "1", "error": "from before", "error_after": "from before"}
    results.write_text(json.dumps(row) + "\n")
    arguments = ["--packages", "torchvision", "--models", "torchvision: raft_small",
                 "torchvision: lraspp_mobilenet_v3_large", "--results", results, "--table", page]  # fmt: skip
    done = launch(str(RECIPES / "benchmarks" / "ecosystem.py"), *map(str, arguments))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["name"].partition(": ")[2] for row in rows] == ["raft_small", "lraspp_mobilenet_v3_large"]
    assert rows[1]["same"]
    assert rows[1]["equal"] == ""
    assert "| torchvision: lraspp_mobilenet_v3_large | 3.2M | " in page.read_text()
