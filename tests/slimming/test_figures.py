"""The figures of a report show the networks of all methods."""

import pytest
from helpers.searches import held_out, make_supernet, rename_method

from timm_autoslim import baseline, search
from timm_autoslim.slimming.figures import FIGURES, find_network, list_networks, render_png

BUDGETS = ["macs<=60%", "params<=40%"]


@pytest.fixture(scope="module")
def results():
    supernet = make_supernet()
    evaluate = held_out(supernet)
    return [search(supernet, BUDGETS, evaluate), baseline(supernet, BUDGETS, evaluate, "uniform")]


def test_networks_come_by_budget_and_method(results):
    networks = list_networks(results)
    assert list(networks) == BUDGETS
    assert [network.name for network in networks["params<=40%"]] == ["params-40pct-searched", "params-40pct-uniform"]
    assert find_network(networks["macs<=60%"], "uniform") == results[1].networks[0]
    assert find_network(networks["macs<=60%"], "random") is None


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn(results, name):
    draw, title, text = FIGURES[name]
    figure = draw(results)
    assert render_png(figure).startswith(b"\x89PNG")
    assert title
    assert text.endswith(".")


def test_axes_and_legends_are_in_the_field_s_words(results):
    losses, modules = (FIGURES[name][0](results) for name in ("losses", "modules"))
    assert [ax.get_xlabel() for ax in losses.axes] == ["million MACs", "million parameters"]
    assert losses.axes[0].get_ylabel() == "held-out loss"
    labels = [text.get_text() for text in modules.axes[0].get_legend().get_texts()]
    assert labels == ["widest", "searched macs<=60%", "searched params<=40%"]


def test_a_method_of_another_name_is_drawn_too(results):
    other = rename_method(results[0], "reference, loss")
    assert render_png(FIGURES["losses"][0]([*results, other]))
