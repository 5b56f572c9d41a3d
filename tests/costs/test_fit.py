"""Fits of latencies: factors, anchors and reports."""

import numpy as np
import pytest
import torch
from helpers.models import TwoGroups

from timm_autoslim import LatencyReport, convert
from timm_autoslim.costs.fit import ANCHORS, choose_anchors, fit_factors


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    return convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))


def test_factors_are_found_again_and_never_negative():
    rng = np.random.default_rng(0)
    rows = np.column_stack([np.ones(8), rng.uniform(1, 9, 8), rng.uniform(1, 9, 8)])
    assert fit_factors(rows, rows @ [0.5, 1.2, 0.8]) == pytest.approx([0.5, 1.2, 0.8])
    factors = fit_factors(rows, rows @ [0.0, 2.0, -0.1])
    assert min(factors) == 0 < factors[1]


def test_a_report_gives_errors_and_ranks():
    report = LatencyReport((), (1.0, 2.0, 4.0), (1.1, 2.0, 3.0))
    assert report.errors == pytest.approx((0.1, 0.0, 0.25))
    assert report.median_error == pytest.approx(0.1)
    assert report.rank_correlation == pytest.approx(1)
    assert LatencyReport((), (1.0, 2.0, 4.0), (3.0, 2.0, 1.0)).rank_correlation == pytest.approx(-1)


def test_anchors_are_different_subnets(supernet):
    subnets = choose_anchors(supernet)
    assert len(subnets) == len(set(subnets)) == ANCHORS
