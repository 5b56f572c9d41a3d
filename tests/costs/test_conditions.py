"""Conditions are checked when they are made."""

import re

import numpy as np
import pytest
import torch
from helpers.models import TwoGroups

from timm_autoslim import Conditions, convert, cost
from timm_autoslim.errors import BudgetError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0; needed: a positive integer"),
        ({"batch_size": 2.5}, "batch_size: got 2.5; needed: a positive integer"),
        ({"dtype": torch.int8}, "dtype: got torch.int8; needed: a floating point type"),
        ({"dtype": "half"}, "dtype: got 'half'; needed: a floating point type"),
        ({"latency": 3}, "latency: got 3; needed: an object with a method predict(supernet, widths)"),
    ],
)
def test_bad_conditions_are_refused(given, message):
    with pytest.raises(BudgetError, match=re.escape(message)):
        Conditions(**given)
    supernet = convert(TwoGroups(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(BudgetError, match=re.escape(message)):
        cost(supernet, **given)


def test_conditions_are_equal_if_all_they_say_is():
    assert Conditions(np.int64(4)) == Conditions(batch_size=4) != Conditions(4, torch.float16)
    assert type(Conditions(np.int64(4)).batch_size) is int
