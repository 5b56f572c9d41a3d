"""Rules that contradict each other are told, with both and with the one that wins; exceptions are none."""

import warnings

import pytest
import torch
from helpers.models import TwoGroups

from timm_autoslim import convert
from timm_autoslim.supernet.conflicts import list_conflicts

IMAGE = torch.zeros(1, 3, 8, 8)  # the groups are "stem" (32, also of `outer`) and "inner" (64)


def find_conflicts(**rules):
    return list_conflicts(convert(TwoGroups(32), IMAGE, **rules).space)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"min": {"*": "25%", "inner": 32}, "divisor": {"*": 8, "inner": 16}},  # exceptions
        {"min": 0.5, "choices": {"inner": [8]}},
        {"divisor": 16, "choices": {"inner": [7]}},
        {"min": {"stem": 8, "inner": 8}},  # of different groups
        {"min": {"inner": "50%", "*": 0.5}},  # the same
        {"choices": {"inner": ["50%"], "*": [0.5]}},
        {"min": "25%", "divisor": 8, "choices": [16, 24]},  # choices that both allow
        {"min": 0.25, "divisor": 8, "choices": ["50%"]},
    ],
)
def test_exceptions_and_equal_rules_are_no_conflicts(rules):
    assert find_conflicts(**rules) == []


@pytest.mark.parametrize(
    ("rules", "texts"),
    [
        (
            {"min": {"inner": 32, "*": 0.25}},
            ["min 'inner': 32 has no effect: min '*': 0.25 comes later, matches all of its groups (inner) and wins"],
        ),
        (
            {"divisor": {"stem": 4, "outer": 8}},
            ["divisor 'stem': 4 has no effect: divisor 'outer': 8 comes later, matches all of its groups (stem)"],
        ),
        (
            {"min": 0.5, "choices": [8, "50%"]},
            ["choices=[8, '50%'] and min=0.5 contradict each other in inner, stem (the width 8 of stem"],
        ),
        (
            {"divisor": {"inner": 16}, "choices": {"*": [10, 16]}},
            ["choices '*': [10, 16] and divisor 'inner': 16 contradict each other in inner (the width 10 of inner"],
        ),
    ],
)
def test_a_conflict_names_both_rules_and_the_one_that_wins(rules, texts):
    for text, start in zip(find_conflicts(**rules), texts, strict=True):
        assert text.startswith(start)
        assert "win" in text


def test_globs_that_share_some_groups_are_a_conflict():
    class Three(TwoGroups):
        def __init__(self):
            super().__init__(32)
            self.first, self.last = torch.nn.Conv2d(3, 16, 1), torch.nn.Conv2d(16, 3, 1)

        def forward(self, x):
            return super().forward(self.last(self.first(x)))

    space = convert(Three(), IMAGE, min={"[fi]*": 4, "[is]*": 8}).space
    assert list_conflicts(space) == [
        "min '[fi]*': 4 and min '[is]*': 8 both match inner: the later one wins; name these groups "
        "by a glob of their own"
    ]


def test_the_warning_stands_at_the_call():
    with pytest.warns(UserWarning, match="min 'inner': 32 has no effect") as caught:
        convert(TwoGroups(32), IMAGE, min={"inner": 32, "*": 0.25})
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(TwoGroups(32), IMAGE, min={"*": 0.25, "inner": 32})
