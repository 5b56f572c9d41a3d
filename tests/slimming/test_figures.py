"""The figures of a report show the networks of all methods."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from helpers.searches import held_out, make_supernet, rename_method

from timm_autoslim import baseline, search
from timm_autoslim.slimming.figures import (
    FIGURES,
    INK,
    QUIET,
    _join_small,
    _make_rows,
    draw_descent,
    draw_losses,
    find_network,
    list_networks,
    read_width,
    render_svg,
)

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
    tree = ElementTree.fromstring(render_svg(figure))
    texts = {element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")}
    group = results[0].groups[0]
    shown = {"widths": f"{group.name}  {group.size}", "descent": group.name, "losses": "uniform",
             "modules": next(iter(results[0].macs_by_module))}  # fmt: skip
    assert shown[name] in texts
    assert "original" in texts  # everywhere
    assert title
    assert text.endswith(".")


def test_the_bar_of_one_method_is_in_the_middle_and_those_of_two_are_beside_it(results):
    for shown, middles in ((results[:1], [0.0]), (results, [-0.2, 0.2])):
        bars = FIGURES["widths"][0](shown).axes[0].containers
        places = [bar[0].get_y() + bar[0].get_height() / 2 for bar in bars]
        assert places == pytest.approx([0.0, *middles])  # the first is the original


def test_axes_and_legends_are_in_the_field_s_words(results):
    losses, modules = (FIGURES[name][0](results) for name in ("losses", "modules"))
    assert [ax.get_xlabel() for ax in losses.axes] == ["million MACs", "million parameters"]
    assert losses.axes[0].get_ylabel() == "held-out loss"
    labels = [text.get_text() for text in modules.legends[0].get_texts()]
    assert labels == ["original", "searched macs<=60%", "searched params<=40%"]


def test_legends_are_at_the_left_above_the_axes_for_phones(results):
    for name in ("widths", "losses", "modules"):
        figure = FIGURES[name][0](results)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, width = legend.get_window_extent(), figure.get_window_extent().width
        assert box.x0 < 0.1 * width
        assert all(box.y0 >= ax.get_window_extent().y1 for ax in figure.axes)


@pytest.mark.parametrize(("rows", "shown"), [(10, False), (80, True)])
def test_a_tall_figure_has_its_axis_at_the_top_too(rows, shown):
    figure, axes = _make_rows(rows)
    figure.draw_without_rendering()
    assert axes[0].xaxis.get_tick_params()["labeltop"] is shown


def test_pictures_follow_the_reader_s_light_or_dark_page_and_are_the_same_every_time(results):
    first, second = (render_svg(FIGURES["losses"][0](results)) for _ in range(2))
    assert first == second
    assert b"prefers-color-scheme: dark" in first
    assert b"currentColor" in first
    assert INK.encode() not in first
    assert QUIET.encode() not in first


def test_the_descent_starts_at_the_original_and_shows_the_networks(results):
    figure = FIGURES["descent"][0](results)
    original, descent, networks = figure.axes[0].lines[:3]
    assert original.get_xydata().tolist() == [[results[0].widest.macs / 1e6, results[0].widest_loss]]
    assert len(descent.get_xydata()) == len(results[0].steps) + 1
    assert networks.get_xydata()[:, 1].tolist() == [network.loss for network in results[0].networks]


def test_a_method_of_another_name_is_drawn_too(results):
    other = rename_method(results[0], "reference, loss")
    assert render_svg(FIGURES["losses"][0]([*results, other]))


def test_modules_with_hardly_any_macs_are_one_row_where_there_are_many():
    large, small = {f"large{i}": 1000 for i in range(30)}, {f"small{i}": 2 for i in range(20)}
    widest, network = large | small, dict.fromkeys(large, 400) | dict.fromkeys(small, 1)
    joined = _join_small([widest, network])
    assert joined == [large | {"20 others": 40}, dict.fromkeys(large, 400) | {"20 others": 20}]
    assert _join_small([small]) == [small]  # few modules are all shown


def test_the_colour_bar_of_a_descent_does_not_grow_with_the_groups(results):
    heights = []
    for count in (3, 80):
        groups = tuple(replace(results[0].groups[0], name=f"g{i}") for i in range(count))
        steps = tuple(replace(step, group="g0") for step in results[0].steps)
        figure = draw_descent([replace(results[0], groups=groups, steps=steps)])
        render_svg(figure)
        bar = next(ax for ax in figure.axes[1].child_axes)
        heights.append(bar.get_window_extent().height / figure.dpi)
    assert heights[1] < 2.5
    assert heights[0] < heights[1] * 1.2


def test_the_width_of_a_picture_is_read_from_it(results):
    assert read_width(render_svg(draw_losses(results))) == pytest.approx(8 * 72, rel=0.1)
