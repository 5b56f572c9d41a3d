"""The metrics of a subnet: how each is counted and printed, and whether it grows with the widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from timm_autoslim.costs.conditions import Conditions
from timm_autoslim.costs.tape import get_tape
from timm_autoslim.errors import BudgetError, LatencyError
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.utils.tables import Table


@dataclass(frozen=True)
class Metric:
    """One metric of a subnet.

    Attributes:
        count: counts it for a subnet under some conditions.
        grows: whether a subnet with a wider group never has less of it. Memory and latency may fall: attention can win
            a fused kernel, for example.
        label: its name with its unit of measure, for axes and tables.
        scale: how many make one of that unit.
        places: decimal places of a number in that unit.
    """

    count: Callable[[Supernet, Widths, Conditions], float]
    grows: bool
    label: str
    scale: float
    places: int

    def format(self, value: float) -> str:
        """Return a value for people, such as "12.35 million MACs"."""
        return f"{self.format_number(value)} {self.label}"

    def format_number(self, value: float) -> str:
        """Return the number of that text alone."""
        return f"{value / self.scale:,.{self.places}f}"


METRICS: Table[Metric] = Table("metric", BudgetError)
"""Metrics by name; each counts one cost of a subnet, and says how it is written for people."""


def _count_macs(supernet: Supernet, widths: Widths, conditions: Conditions) -> int:
    return supernet.graph.macs(widths.values_)


def _count_params(supernet: Supernet, widths: Widths, conditions: Conditions) -> int:
    return supernet.graph.params(widths.values_)


def _count_peak_bytes(supernet: Supernet, widths: Widths, conditions: Conditions) -> int:
    return get_tape(supernet, conditions.batch_size, conditions.dtype).peak_bytes(widths.values_)


def _predict_latency(supernet: Supernet, widths: Widths, conditions: Conditions) -> float:
    latency = conditions.latency
    if latency is None:
        remedy = (
            "give conditions=Conditions(latency=LatencyTable()) to slim, search, baseline, parse_budgets and "
            "uniform_at, or latency=LatencyTable() to cost"
        )
        raise BudgetError.at("latency_ms", got="no latency table", needed="a LatencyTable of a device", remedy=remedy)
    milliseconds = latency.predict(supernet, widths)
    if not isinstance(milliseconds, Real) or not 0 < milliseconds < float("inf"):
        where = f"{type(latency).__name__}.predict"
        got = f"{milliseconds!r} at the widths {widths.to_dict()}"
        raise LatencyError.at(where, got=got, needed="a positive number of milliseconds")
    return float(milliseconds)


METRICS.add("macs")(Metric(_count_macs, grows=True, label="million MACs", scale=1e6, places=2))
METRICS.add("params")(Metric(_count_params, grows=True, label="million parameters", scale=1e6, places=3))
METRICS.add("peak_bytes")(Metric(_count_peak_bytes, grows=False, label="megabytes", scale=1e6, places=3))
METRICS.add("latency_ms")(Metric(_predict_latency, grows=False, label="milliseconds", scale=1.0, places=3))
