"""The user's rules: least widths, divisors and choices, for all groups or by glob, and what holds without any."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import WidthError
from timm_autoslim.supernet.rules import DEFAULT_MIN, choose_divisor

IMAGE = torch.zeros(1, 3, 8, 8)


def space_with(**rules):
    return convert(TwoGroups(32), IMAGE, **rules).space


def test_without_rules_a_group_has_about_eight_steps_from_the_default_minimum():
    space = space_with()
    assert (space["stem"].divisor, space["inner"].divisor) == (4, 8)
    assert space["stem"].choices == (8, 12, 16, 20, 24, 28, 32)
    assert space["inner"].choices == (16, 24, 32, 40, 48, 56, 64)
    assert space["inner"].min == round(DEFAULT_MIN * 64)
    assert space["inner"].floor == 1


@pytest.mark.parametrize(
    ("size", "channels", "divisor"),
    [
        (64, 1, 8),
        (1280, 1, 8),
        (63, 1, 4),
        (32, 1, 4),
        (16, 1, 2),
        (15, 1, 1),
        (2, 1, 1),
        (32, 4, 2),
        (8, 4, 1),
        (9, 16, 1),
    ],
)
def test_the_choose_divisor_is_eight_channels_or_leaves_eight_steps(size, channels, divisor):
    assert choose_divisor(size, channels) == divisor


def test_rules_for_all_and_by_glob():
    assert space_with(min=0.5)["inner"].choices == (32, 40, 48, 56, 64)
    assert space_with(min=30)["inner"].choices == (32, 40, 48, 56, 64)
    assert space_with(min=1.0).min().to_dict() == {"stem": 32, "inner": 64}
    assert space_with(min="10%").min().to_dict() == space_with(min=0.1).min().to_dict()
    assert space_with(min={"inner": " 62.5 %"})["inner"].min == 40
    assert space_with(min=np.float32(0.5))["inner"].min == 32
    assert space_with(divisor=20)["inner"].choices == (20, 40, 60, 64)
    by_glob = space_with(min={"inn*": 0.75}, divisor={"*": 16, "inner": 4}, choices={"outer": [7, 3]})
    assert by_glob["inner"].choices == (48, 52, 56, 60, 64)  # the last glob that matches
    assert by_glob["stem"].choices == (3, 7, 32)  # matched by another of its modules; the widest is always there
    assert by_glob.min().to_dict() == {"stem": 3, "inner": 48}
    assert by_glob.from_dict({"stem": 1, "inner": 1}).to_dict() == {"stem": 1, "inner": 1}  # rules shape sampling only


def test_choices_are_numbers_or_shares_for_all_or_by_glob():
    assert space_with(choices=[0.25, "50%", 1.0])["inner"].choices == (16, 32, 64)
    assert space_with(choices={"inner": [7, 0.001, "50%"]})["inner"].choices == (1, 7, 32, 64)
    assert space_with(choices=[8, 16])["stem"].choices == (8, 16, 32)


def test_a_module_stands_for_all_modules_in_it():
    model = nn.Sequential(OrderedDict(body=TwoGroups(32).eval()))
    for rules in ({"min": {"body": 0.5}}, {"min": {"*": 0.25, "body": "50%"}}):
        assert convert(model, IMAGE, **rules).space.min().to_dict() == {"body.stem": 16, "body.inner": 32}


def test_rules_take_numpys_integers_and_make_them_pythons_own():
    space = space_with(min={"inner": np.int64(4)}, divisor=np.int64(8), choices={"stem": np.array([8, 16])})
    assert json.dumps([group.choices for group in space.groups]) == json.dumps(
        [[8, 16, 32], [8, 16, 24, 32, 40, 48, 56, 64]]
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"min": 0}, r"stem: got min=0; needed: an integer from 1 to 32, or a share .* such as 0.25 or \"25%\""),
        ({"min": 1.5}, r"stem: got min=1\.5; needed"),
        ({"min": -0.1}, r"stem: got min=-0\.1; needed"),
        ({"min": {"inner": 65}}, r"inner: got min=65; needed: an integer from 1 to 64"),
        ({"min": True}, r"stem: got min=True; needed: an integer from 1 to 32"),
        ({"min": "8"}, r"stem: got min='8'; needed"),
        ({"min": "0%"}, r"stem: got min='0%'; needed"),
        ({"min": "%"}, r"stem: got min='%'; needed"),
        ({"min": "120%"}, r"stem: got min='120%'; needed"),
        ({"choices": {"inner": []}}, r"inner: got choices=\[\]; needed: a list of at least one width"),
        ({"choices": "8"}, r"stem: got choices='8'; needed: a list of at least one width or share"),
        ({"choices": {"inner": ["8"]}}, r"inner: got the width '8'; needed: an integer from 1 to 64, or a share"),
        ({"choices": {"inner": 8}}, r"inner: got choices=8; needed: a list of at least one width"),
        ({"choices": {"inner": [8.0]}}, r"inner: got the width 8\.0; needed: an integer from 1 to 64"),
        ({"divisor": True}, r"stem: got divisor=True; needed: an integer of at least 1"),
        ({"divisor": 0}, r"stem: got divisor=0; needed: an integer of at least 1"),
        ({"divisor": 0.5}, r"stem: got divisor=0\.5; needed: an integer"),
        ({"choices": {"inner": [8, 65]}}, r"inner: got the width 65; needed: an integer from 1 to 64"),
        (
            {"min": {"layer*": 8}},
            r"min: got a glob \('layer\*'\) that matches no group; needed: .*; there are \['stem', 'inner', 'outer'",
        ),
        ({"min": {"iner": 8}}, r"min: got a glob \('iner'\) that matches no group; .*; the closest are \['inner'"),
        ({"divisor": {"layer*": 8}}, r"divisor: got a glob \('layer\*'\) that matches no group"),
        (
            {"min": {"head": 8}},
            r"min: got a glob \('head'\) that matches modules whose channels are all fixed \(an output of the.*\); .*"
            r"leave it out: min says nothing of fixed channels",
        ),
        ({"choices": {"layer*": [8]}}, r"choices: got a glob \('layer\*'\) that matches no group"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(rules, message):
    with pytest.raises(WidthError, match=message):
        space_with(**rules)


def test_a_glob_of_frozen_modules_says_so():
    text = r"'layer1'\) that matches modules whose channels are all fixed \(frozen by the user \(layer1\)\)"
    with pytest.raises(WidthError, match=text + ".*leave it out: min says nothing of fixed channels"):
        convert(timm.create_model("resnet10t", num_classes=10), IMAGE, freeze="layer1", min={"layer1": 8})


class Counting(nn.Module):
    """Six convolutions of as many channels as an attribute says, so that they are one group of several parts."""

    def __init__(self):
        super().__init__()
        self.channels = 8
        self.layers = nn.ModuleList(nn.Conv2d(3 if i % 2 == 0 else 8, 8, 1) for i in range(6))
        self.last = nn.Conv2d(24, 4, 1)

    def count(self, x):
        return x.view(len(x), self.channels, 8, 8)

    def forward(self, x):
        parts = [self.count(self.layers[i + 1](self.count(self.layers[i](x)))) for i in (4, 0, 2)]
        return self.last(torch.cat(parts, 1))


def test_producers_of_a_group_are_in_the_order_of_execution():
    (group,) = convert(Counting(), IMAGE).space.groups
    assert group.producers == tuple(f"layers.{i}" for i in (4, 5, 0, 1, 2, 3))
