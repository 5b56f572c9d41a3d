"""Costs for people."""

import pytest
import torch
from torch import nn

from timm_autoslim import convert
from timm_autoslim.utils.amounts import write_amount


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0K"),
        (99_900, "99.9K"),
        (100_000, "0.10M"),
        (1_234_567, "1.23M"),
        (4.1e9, "4100.00M"),
        (41e9, "41.00G"),
    ],
)
def test_the_unit_follows_the_size(value, text):
    assert write_amount(value, 2) == text


def test_the_table_of_a_small_space_shows_its_costs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    lines = str(convert(model, torch.zeros(1, 3, 8, 8)).space).splitlines()
    assert "8.4K MACs (100.0%)" in lines[-1]
    assert " 242 params (100.0%)" in lines[-1]
