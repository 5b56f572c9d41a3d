"""What a subnet costs, without a forward pass: functions of the widths that the trace gave."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from timm_autoslim.errors import BudgetError, ConfigError, LatencyError
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.utils.arguments import check_integer

if TYPE_CHECKING:
    from timm_autoslim.supernet.space import Widths
    from timm_autoslim.supernet.supernet import Supernet


class Latency(Protocol):
    """What predicts how long a subnet runs, such as a `LatencyTable`."""

    def predict(self, supernet: Supernet, widths: Widths) -> float:
        """Return milliseconds for one batch."""


@dataclass(frozen=True)
class Conditions:
    """What `peak_bytes` and `latency_ms` are counted for; MACs and parameters depend on none of it.

    Attributes:
        batch_size: images in a batch, for `peak_bytes`.
        dtype: type of weights and activations, for `peak_bytes`; None is that of the model.
        latency: what predicts `latency_ms`, for the device, runtime, batch size and type that it was made for.
    """

    batch_size: int = 1
    dtype: torch.dtype | None = None
    latency: Latency | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", check_integer("batch_size", self.batch_size, BudgetError))
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise BudgetError(
                f"got dtype={self.dtype!r}; needed: a floating point type, such as torch.float16, or None"
            )
        if self.latency is not None and not callable(getattr(self.latency, "predict", None)):
            raise BudgetError(f"got latency={self.latency!r}; needed: what predicts, such as a LatencyTable, or None")


@dataclass(frozen=True)
class _Meter:
    """Where the costs come from that are not read off the graph."""

    supernet: Supernet
    widths: Widths
    conditions: Conditions


def _peak_bytes(meter: _Meter) -> int:
    tape = meter.supernet.tape(meter.conditions.batch_size, meter.conditions.dtype)
    return tape.peak_bytes(meter.widths.values_)


def _latency_ms(meter: _Meter) -> float:
    if meter.conditions.latency is None:
        raise BudgetError(
            "latency_ms is known only for a named device; needed: a LatencyTable, as cost(..., latency=table), or "
            "for a search supernet.conditions = Conditions(latency=table)"
        )
    found = meter.conditions.latency.predict(meter.supernet, meter.widths)
    if not isinstance(found, Real) or not 0 < found < float("inf"):
        raise LatencyError(
            f"{type(meter.conditions.latency).__name__}.predict: got {found!r} at the widths "
            f"{meter.widths.to_dict()}; needed: a positive number of milliseconds"
        )
    return float(found)


@dataclass(frozen=True)
class Cost:
    """Cost of one subnet.

    Attributes:
        macs: multiply-adds of convolutions and matrix products for one image in eval mode; one MAC is one multiply-add;
            no bias, normalisation, activation or pooling (the counting rule of arXiv 1903.11728's tables, less the
            final average pool that its authors add).
        params: number of parameters.
    """

    macs: int
    params: int

    _meter: ClassVar[_Meter | None] = None

    @property
    def peak_bytes(self) -> int:
        """The most memory that inference takes at once: weights, inputs and activations of one batch, in bytes.

        From the lifetimes of the tensors of the model's own forward in eval mode without gradients: views share memory,
        in-place operators take none, and a tensor is freed when Python lets go of it. What a kernel takes and frees
        by itself (workspace) is not counted. Batch size and type are those of `conditions`, see `cost`.

        Raises:
            TraceError: the lifetimes cannot be told, because narrower subnets run other operators.
        """
        return int(self._read("peak_bytes", _peak_bytes))

    @property
    def latency_ms(self) -> float:
        """The milliseconds for one batch, predicted from measured operators by the `conditions`' latency table.

        Raises:
            BudgetError: there is no latency table.
            LatencyError: the table cannot measure here, or what it says is no positive number.
        """
        return float(self._read("latency_ms", _latency_ms))

    def kept(self, units: Iterable[str]) -> Cost:
        """Return this cost to be kept: it knows these units, and no longer holds the supernet that others need."""
        for unit in units:
            getattr(self, unit)
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the supernet out of copies and pickles; what was read before stays known."""
        return {name: value for name, value in self.__dict__.items() if name != "_meter"}

    def _read(self, unit: str, tell: Callable[[_Meter], float]) -> float:
        """Return a cost that is told when it is first asked for, and remembered."""
        if unit not in self.__dict__:  # beside the property of this name, which has the say
            if self._meter is None:
                raise BudgetError(f"this cost is kept without {unit}; call cost(supernet, widths) for {unit}")
            self.__dict__[unit] = tell(self._meter)
        found: float = self.__dict__[unit]
        return found


def cost_of(graph: ChannelGraph, widths: Sequence[int]) -> Cost:
    """Return MACs and parameters of a graph at these widths, one for each group."""
    return Cost(graph.macs(widths), graph.params(widths))


def cost(
    supernet: Supernet,
    widths: Widths | None = None,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    latency: Latency | None = None,
) -> Cost:
    """Return the cost of a subnet (the widest if no widths are given), without running it.

    `macs` and `params` are there at once. The first `peak_bytes` at a batch size and type runs a few subnets on the
    meta device, about as long as converting does; all others take less than a millisecond. `latency_ms` needs a table.

    Args:
        supernet: the supernet.
        widths: the subnet.
        batch_size, dtype: for `peak_bytes`; by default those of `supernet.conditions`, one image in the model's type.
        latency: for `latency_ms`; by default that of `supernet.conditions`.

    Raises:
        WidthError: the widths are of another model.
        BudgetError: the batch size is not positive, the type no floating point type, or the latency predicts nothing.
        ConfigError: the model is no supernet.
    """
    check_supernet(supernet)
    widths = supernet.space.check(widths if widths is not None else supernet.space.max())
    usual = supernet.conditions
    conditions = Conditions(
        usual.batch_size if batch_size is None else batch_size,
        usual.dtype if dtype is None else dtype,
        usual.latency if latency is None else latency,
    )
    found = cost_of(supernet.graph, widths.values_)
    object.__setattr__(found, "_meter", _Meter(supernet, widths, conditions))
    return found


def check_supernet(supernet: Any) -> None:
    """Raise ConfigError if this is no supernet."""
    # the room of supernets stands on this one, so that it cannot be asked for here
    if not isinstance(getattr(supernet, "graph", None), ChannelGraph):
        raise ConfigError(
            f"the supernet: got a {type(supernet).__name__}; needed: a Supernet, as convert(model) returns"
        )


def cost_by_module(supernet: Supernet, widths: Widths | None = None) -> dict[str, int]:
    """Return the MACs of every module that multiplies, in the order of execution."""
    values = supernet.space.check(widths if widths is not None else supernet.space.max()).values_
    macs: dict[str, float] = defaultdict(float)
    for product in supernet.graph.products:
        macs[product.path] += product.constant * prod(c(values) for c in product.counts)
    return {path: round(m) for path, m in macs.items()}


@dataclass(frozen=True)
class Reach:
    """How far a model can be slimmed.

    Attributes:
        whole, half, narrowest: cost with every group at its size, at half of it (rounded down), and at its narrowest.
        held: what keeps the MACs at half width above the ideal quarter: reason (numbers in paths are `*`), and its
            share of the whole's MACs; the largest first.
    """

    whole: Cost
    half: Cost
    narrowest: Cost
    held: tuple[tuple[str, float], ...]


def reach(supernet: Supernet) -> Reach:
    """Return how far a model can be slimmed, whatever limits its search space has."""
    graph = supernet.graph
    half = [max(1, n // 2) for n in graph.group_sizes]
    whole = cost(supernet)
    held: dict[str, float] = defaultdict(float)
    for product in graph.products:
        left = prod(c(half) for c in product.counts) - prod(c(graph.group_sizes) for c in product.counts) / 4
        reason = product.reason or f"{product.path}: one side of the product is no channel"
        held[re.sub(r"(?<=\.)\d+(?=[.:])", "*", reason)] += product.constant * left / whole.macs
    ranked = sorted(((r, share) for r, share in held.items() if share > 0), key=lambda item: -item[1])
    return Reach(whole, cost_of(graph, half), cost_of(graph, graph.floors), tuple(ranked))


UNITS = ("macs", "params", "peak_bytes", "latency_ms")


def check_unit(unit: str) -> str:
    """Return `unit`, or raise BudgetError if there is no such cost."""
    if unit not in UNITS:
        raise BudgetError(f"got a budget in {unit!r}; needed: one of {list(UNITS)}")
    return unit
