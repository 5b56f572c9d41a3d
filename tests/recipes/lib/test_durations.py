"""How long stages take."""

import pytest
import torch
from torch import nn

from timm_autoslim.recipes.lib.durations import time_step, write_time


@pytest.mark.parametrize(("seconds", "text"), [(61, "61 s"), (700, "12 min"), (9000, "2.5 h")])
def test_a_duration_is_written_in_the_unit_that_suits(seconds, text):
    assert write_time(seconds) == text


def test_a_step_is_timed_on_a_copy():
    model = nn.Linear(4, 2)
    assert time_step(model, torch.zeros(3, 4)) > 0
    assert model.weight.grad is None
    assert model.training
