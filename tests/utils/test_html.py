"""Tables for notebooks."""

from xml.etree import ElementTree

import timm
import torch

from timm_autoslim import baseline, convert
from timm_autoslim.utils.html import make_html_table


def read_cells(table):
    return [[cell.text for cell in row] for row in ElementTree.fromstring(table).iter("tr")]


def test_cells_are_escaped_and_numbers_are_readable():
    table = make_html_table(["budget", "MACs"], [["macs<=60% & more", 1234567], ["a", 0.123456]], "<Result>")
    assert read_cells(table) == [["budget", "MACs"], ["macs<=60% & more", "1,234,567"], ["a", "0.1235"]]
    assert ElementTree.fromstring(table).find("caption").text == "<Result>"


def test_spaces_widths_and_results_are_tables_in_a_notebook():
    supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
    space = read_cells(supernet.space._repr_html_())
    assert [row[0] for row in space[1:]] == [*supernet.space.names]
    widths = supernet.space.uniform(0.5)
    assert [(row[0], int(row[1]), int(row[2])) for row in read_cells(widths._repr_html_())[1:]] == [
        (group.name, widths[group.name], group.size) for group in supernet.space.groups
    ]
    result = baseline(supernet, {"macs": ["60%", "30%"]}, lambda subnet: 0.25, "uniform")
    rows = read_cells(result._repr_html_())
    assert rows[1][1] == "original"
    assert [row[0] for row in rows[2:]] == list(result.budgets)
    assert rows[2][2] == f"{result.networks[0].cost.macs:,}"
