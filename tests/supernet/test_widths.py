"""The widths of a subnet: a value that holds nothing but widths, however it is made."""

import re

import numpy as np
import pytest
import torch
from helpers.models import TwoGroups

from timm_autoslim import convert
from timm_autoslim.errors import WidthError
from timm_autoslim.supernet.widths import Widths


@pytest.fixture(scope="module")
def space():
    return convert(TwoGroups(32), torch.zeros(1, 3, 8, 8)).space


def test_widths_are_a_frozen_hashable_mapping(space):
    widths = space.from_dict({"stem": 5, "inner": 7})
    assert dict(widths) == widths.to_dict() == {"stem": 5, "inner": 7}
    assert widths["inner"] == 7
    assert list(widths) == ["stem", "inner"]
    assert "head" not in widths
    with pytest.raises(KeyError, match="head"):
        widths["head"]
    with pytest.raises(AttributeError, match="cannot assign"):
        widths.values_ = (1, 1)
    same = space.from_dict({"inner": 7, "stem": 5})
    assert {widths: 1}[same] == 1
    narrower = widths.replace("inner", 6)
    assert narrower.to_dict() == {"stem": 5, "inner": 6}
    assert narrower != widths
    assert widths != {"stem": 5, "inner": 7}
    assert widths != Widths(widths.values_, widths.groups, "another space")
    assert repr(widths) == "Widths({'stem': 5, 'inner': 7})"


NO_WIDTHS = [0, -3, 10**6, 2.5, 4.0, True, "4", None, np.float64(4)]


@pytest.mark.parametrize("width", NO_WIDTHS)
def test_widths_hold_nothing_but_widths_however_they_are_made(space, width):
    message = re.escape(f"inner: got the width {width!r}; needed: an integer from 1 to 64")
    makers = (
        lambda: space.max().replace("inner", width),
        lambda: space.from_dict({"stem": 8, "inner": width}),
        lambda: Widths((8, width), space.groups, space.id),
    )
    for make in makers:
        with pytest.raises(WidthError, match=message):
            make()
    with pytest.raises(WidthError, match=r"inner: got .* channels; needed: an integer from 1 to 64"):
        space.from_channels({"inner": width})


def test_an_unknown_group_is_not_replaced(space):
    with pytest.raises(
        WidthError, match=r"the search space: got 'innr'; needed: one of the 2 groups; the closest are \['in"
    ):
        space.max().replace("innr", 4)
