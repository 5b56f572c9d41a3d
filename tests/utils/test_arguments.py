"""Numbers that a user gives: integers of every type are taken, and what is none is named."""

import re

import numpy as np
import pytest
import torch

from timm_autoslim.errors import BudgetError, ConfigError
from timm_autoslim.utils.arguments import as_integer, check_integer, is_int, make_generator

INTEGERS = [3, np.int64(3), np.uint8(3), torch.tensor(3)]
OTHERS = [True, np.bool_(True), 3.0, "3", None, [3], np.float64(3), torch.tensor(3.0)]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers_of_every_type_become_ints(value):
    for number in (as_integer(value), check_integer("steps", value, ConfigError)):
        assert number == 3
        assert type(number) is int


@pytest.mark.parametrize("value", OTHERS, ids=repr)
def test_what_is_no_integer_is_none_and_is_refused(value):
    assert as_integer(value) is None
    message = re.escape(f"steps: got {value!r}; needed: a positive integer")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check_integer("steps", value, ConfigError)


@pytest.mark.parametrize(
    ("value", "limits", "needed"),
    [
        (0, {}, "a positive integer"),
        (2**31, {}, "a positive integer"),
        (1, {"least": 2}, "an integer from 2 to 2147483647"),
        (5, {"least": 0, "most": 4}, "an integer from 0 to 4"),
        (-1, {"also": " or None"}, "a positive integer or None"),
    ],
)
def test_integers_out_of_range_are_refused_with_the_range(value, limits, needed):
    with pytest.raises(BudgetError, match=f"^steps: got {value}; needed: {needed}$"):
        check_integer("steps", value, BudgetError, **limits)


def test_the_limits_themselves_are_allowed():
    assert [check_integer("steps", n, ConfigError, 2, 4) for n in (2, 4)] == [2, 4]


def test_only_python_ints_are_ints():
    assert [is_int(value) for value in (3, -1, True, 3.0, np.int64(3), "3", None)] == [True, True] + [False] * 5


def test_a_seed_gives_the_same_numbers_each_time():
    draws = [torch.rand(3, generator=make_generator(seed)) for seed in (7, np.int64(7), 8, -1, 2**64 - 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("seed", [None, "a", 1.0, True, 2**64, -(2**63) - 1])
def test_what_is_no_seed_is_refused(seed):
    needed = f"an integer from {-(2**63)} to {2**64 - 1}"
    with pytest.raises(ConfigError, match=re.escape(f"seed: got {seed!r}; needed: {needed}")):
        make_generator(seed)
