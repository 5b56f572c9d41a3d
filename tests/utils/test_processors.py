"""Which types a CPU has instructions for, and the memory layout of weights."""

import pytest
import torch
from torch import nn

from timm_autoslim.utils.processors import describe_slow_type, find_layout, set_layout


@pytest.mark.parametrize(("supported", "warns"), [(False, True), (True, False)])
def test_a_type_for_which_the_cpu_has_no_instructions_is_told(supported, warns, monkeypatch):
    monkeypatch.setattr("timm_autoslim.utils.processors._ask_onednn", lambda query: supported)
    assert bool(describe_slow_type(nn.Linear(2, 2).half())) is warns
    assert "torch.bfloat16, for which this CPU has no" in describe_slow_type(nn.Linear(2, 2).bfloat16()) or supported
    assert not describe_slow_type(nn.Linear(2, 2))
    assert not describe_slow_type(nn.Linear(2, 2).half().to("meta"))


def test_the_layout_of_convolutions_is_found_and_set():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    assert find_layout(model) is torch.contiguous_format
    set_layout(model, torch.channels_last)
    assert find_layout(model) is torch.channels_last
    assert model[2].weight.is_contiguous()
    set_layout(model, torch.contiguous_format)
    assert find_layout(model) is torch.contiguous_format
    assert find_layout(nn.Linear(4, 2)) is torch.contiguous_format


@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (1, 4, 3, 3)])
def test_the_layout_is_set_where_the_strides_of_both_fit(shape):
    fresh = nn.Conv2d(shape[1], shape[0], 3).weight.stride()
    model = nn.Conv2d(shape[1], shape[0], 3)
    set_layout(model, torch.channels_last)
    set_layout(model, torch.contiguous_format)
    assert model.weight.stride() == fresh
