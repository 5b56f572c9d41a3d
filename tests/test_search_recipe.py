"""recipes/search.py: every method, and budgets of several limits, on one tiny run."""

import csv
import json

import pytest
import search
from recipe_tools import common, trained, write_config

from timm_autoslim.errors import BudgetError, ConfigError

JOINT = "macs<=60% and params <= 50%"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("methods"), "run")


def found(folder, *argv):
    search.main([str(folder), "-c", write_config(folder.parent), *argv])
    return json.loads((folder / "search.json").read_text())


@pytest.mark.parametrize("method", ["greedy", "uniform", "random", "importance", "evolutionary"])
def test_every_method_meets_every_budget(folder, method):
    result = found(folder, "--budgets", "macs=60%", JOINT, "--method", method, "--candidates", "4")
    kinds = {"greedy": ["searched", "uniform"], "uniform": ["uniform"]}.get(method, [method, "uniform"])
    names = ["macs-60pct", "macs-60pct-params-50pct"]
    assert [network["name"] for network in result["networks"]] == [f"{n}-{k}" for n in names for k in kinds]
    assert [(n["unit"], n["asked"]) for n in result["networks"][:: len(kinds)]] == [
        ("macs", "60%"),
        ("macs and params", "60% and 50%"),
    ]
    for network in result["networks"]:
        assert all(network[unit] <= limit for unit, limit in network["limits"].items())
    scored = {"uniform": [2], "importance": [2], "random": range(2, 9), "evolutionary": range(2, 9)}
    assert result["evaluations"] in scored.get(method, range(10, 1000))
    assert result["evaluated_macs"] > 0
    table = list(csv.reader((folder / "search.csv").open()))
    assert len(table) == 1 + len(result["steps"])
    assert bool(result["steps"]) == (method == "greedy")


def test_refining_can_be_turned_off(folder):
    rough, refined = (found(folder, flag) for flag in ("--no-refine", "--refine"))
    space = common.load_supernet(folder, common.read_args(folder, common.parse_args("search", None, ["r"]))).space
    assert all(width in space[group].choices for group, width in rough["networks"][0]["widths"].items())
    assert refined["evaluations"] >= rough["evaluations"]
    assert refined["networks"][0]["error"] <= rough["networks"][0]["error"]
    assert refined["networks"][0]["macs"] >= rough["networks"][0]["macs"]


def test_budgets_become_texts():
    assert search.budget_texts(["macs=50%", JOINT, "params=1M", "macs<=50%"]) == ["macs<=50%", JOINT, "params<=1M"]
    with pytest.raises(BudgetError, match="needed UNIT=AMOUNT"):
        search.budget_texts([JOINT, "50%"])


def test_no_candidates_are_refused(folder):
    with pytest.raises(ConfigError, match=r"--candidates 0: at least 1 is needed"):
        search.main([str(folder), "--method", "random", "--candidates", "0"])
