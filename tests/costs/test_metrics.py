"""Every metric is a field of a cost; a latency that is no time is refused."""

import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers.models import TwoGroups

from timm_autoslim import METRICS, Conditions, Cost, convert, cost, search
from timm_autoslim.errors import BudgetError, LatencyError


@pytest.fixture
def supernet():
    return convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))


def test_every_metric_is_a_field_of_a_cost():
    assert list(METRICS) == [field.name for field in fields(Cost)] == ["macs", "params", "peak_bytes", "latency_ms"]
    assert [name for name, metric in METRICS.items() if metric.grows] == ["macs", "params"]
    with pytest.raises(BudgetError, match=re.escape(f"metric: got 'flops'; needed: one of {list(METRICS)}")):
        METRICS.pick("flops")


def test_metrics_are_printed_with_their_units():
    texts = [metric.format(1234567.8) for metric in METRICS.values()]
    assert texts == ["1.23 million MACs", "1.235 million parameters", "1.235 megabytes", "1,234,567.800 milliseconds"]


def test_a_budget_of_latency_needs_a_table(supernet):
    with pytest.raises(BudgetError, match="latency_ms: got no latency table; needed: a LatencyTable of a device"):
        search(supernet, ["macs<=50% and latency_ms<=8"], lambda subnet: 1.0)


class Constant:
    def __init__(self, value):
        self.value = value

    def predict(self, supernet, widths):
        return self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, None, "3"])
@pytest.mark.parametrize("budget", ["50%", "0.001"])
def test_a_latency_that_is_no_time_is_refused(supernet, value, budget):
    conditions = Conditions(latency=Constant(value))
    message = (
        rf"Constant\.predict: got {value!r} at the widths \{{'stem': 32.*; needed: a positive number of milliseconds"
    )
    with pytest.raises(LatencyError, match=message):
        search(supernet, {"latency_ms": budget}, lambda subnet: 1.0, conditions=conditions)
    assert cost(supernet, latency=Constant(np.float32(2))).latency_ms == 2
    with pytest.raises(BudgetError, match=r"latency: got 't\.json'; needed: an object with a method predict"):
        cost(supernet, latency="t.json")
