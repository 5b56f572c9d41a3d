"""Stages on the way to a far budget."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_autoslim import Budget, Cost
from timm_autoslim.slimming.stages import list_stages


@pytest.mark.parametrize(("share", "count"), [(0.9, 1), (0.5, 1), (0.49, 2), (0.25, 2), (0.24, 3), (0.05, 5), (1.5, 1)])
def test_no_stage_leaves_less_than_half(share, count):
    assert len(list_stages(Budget((("macs", 1000 * share),)), Cost(macs=1000, params=10))) == count


@given(st.floats(0.001, 1.2), st.floats(0.001, 1.2))
def test_every_stage_leaves_the_same_shares_and_the_last_is_the_budget(macs, params):
    widest, budget = Cost(macs=10**6, params=10**5), Budget((("macs", macs * 1e6), ("params", params * 1e5)))
    stages = list_stages(budget, widest)
    assert stages[-1] is budget
    for metric, share in (("macs", macs), ("params", params)):
        limits = [widest.pick(metric), *(dict(stage.limits)[metric] for stage in stages)]
        ratios = [after / before for before, after in itertools.pairwise(limits)]
        assert ratios == pytest.approx([share ** (1 / len(stages))] * len(stages))
        assert min(ratios) > 0.5 - 1e-6
