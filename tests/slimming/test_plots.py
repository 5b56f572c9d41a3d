"""Figures of search results for notebooks and papers."""

import io

import pytest
from helpers.searches import held_out, make_supernet
from matplotlib.figure import Figure

from timm_autoslim import baseline, plot, search
from timm_autoslim.errors import ConfigError

BUDGETS = ["macs<=60%", "macs<=30%"]


@pytest.fixture(scope="module")
def results():
    supernet = make_supernet()
    evaluate = held_out(supernet)
    return [search(supernet, BUDGETS, evaluate), baseline(supernet, BUDGETS, evaluate, "uniform")]


@pytest.mark.parametrize("draw", [plot.widths, plot.pareto, lambda searched, _: plot.descent(searched)])
def test_figures_are_matplotlibs_and_show_in_a_notebook(draw, results):
    figure = draw(*results)
    assert isinstance(figure, Figure)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    assert "prefers-color-scheme" in figure._repr_svg_()


def test_wrong_results_are_refused(results):
    with pytest.raises(ConfigError, match="got nothing"):
        plot.widths()
    with pytest.raises(ConfigError, match="got str"):
        plot.pareto("search")
    with pytest.raises(ConfigError, match="one without steps"):
        plot.descent(results[1])
