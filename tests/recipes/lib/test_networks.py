"""The networks of a run, by name and in the order of the budgets."""

import pytest
from helpers.searches import PRICES, charge, make_supernet

from timm_autoslim import baseline, search
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.networks import find_network, is_searched, read_networks, write_results

BUDGETS = ["macs<=60%", "macs<=40%"]


@pytest.fixture(scope="module")
def results():
    supernet = make_supernet()
    evaluate = charge(supernet, **PRICES)
    return {
        "searched": search(supernet, BUDGETS, evaluate, steps=8),
        "uniform": baseline(supernet, BUDGETS, evaluate, "uniform"),
    }


def test_networks_are_read_budget_by_budget(results, tmp_path):
    assert not is_searched(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no search/searched\.json: search first: python recipes/search\.py"):
        read_networks(tmp_path)
    write_results(tmp_path, results)
    assert is_searched(tmp_path)
    names = ["macs-60pct-searched", "macs-60pct-uniform", "macs-40pct-searched", "macs-40pct-uniform"]
    networks = read_networks(tmp_path)
    assert list(networks) == names
    assert networks[names[0]] == results["searched"].networks[0]


def test_results_of_a_search_that_was_killed_are_gone(results, tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "random.json").write_text("{")
    write_results(tmp_path, results)
    assert sorted(path.name for path in (tmp_path / "search").iterdir()) == ["searched.json", "uniform.json"]


def test_a_network_is_found_by_its_name(results, tmp_path):
    write_results(tmp_path, results)
    assert find_network(tmp_path, "macs-40pct-uniform") == results["uniform"].networks[1]
    with pytest.raises(ConfigError, match=r"--network macs-40-uniform: .* Did you mean macs-40pct-uniform\?"):
        find_network(tmp_path, "macs-40-uniform")
