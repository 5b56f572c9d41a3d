"""What a subnet costs, without a forward pass: numbers that follow from the widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from timm_autoslim.costs.conditions import Conditions, Latency
from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.errors import BudgetError, ConfigError
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.utils.arguments import check_type

_ALWAYS = ("macs", "params")  # all others have to be asked for


@dataclass(frozen=True)
class Cost:
    """The cost of one subnet. Two costs are equal if all their metrics are.

    Attributes:
        macs: multiply-adds of convolutions and matrix products for one image in eval mode; one MAC is one multiply-add;
            no bias, normalisation, activation or pooling (the counting rule of arXiv 1903.11728's tables, less the
            final average pool that its authors add).
        params: number of parameters.
        peak_bytes: the most memory that inference takes at once: weights, inputs and activations of one batch, in
            bytes; None if it was not asked for. It follows from the lifetimes of the tensors of the model's own forward
            in eval mode without gradients: views share memory, in-place operators take none, and a tensor is freed when
            Python drops it. Workspace, which a kernel takes and frees by itself, is not counted.
        latency_ms: the milliseconds for one batch, as predicted; None if it was not asked for.

    Example:
        >>> Cost(macs=1_000_000, params=5_000) == Cost(1_000_000, 5_000, peak_bytes=80_000)
        False
    """

    macs: int
    params: int
    peak_bytes: int | None = None
    latency_ms: float | None = None

    def pick(self, metric: str) -> float:
        """Return a metric by name, a key of `METRICS`.

        Raises:
            BudgetError: there is no such metric, or it was not asked for.
        """
        check_type("metric", metric, str, BudgetError, f"one of {list(METRICS)}")
        value: float | None = self.__dict__.get(metric)
        if value is None:
            METRICS.pick(metric)
            argument = "latency=table" if metric == "latency_ms" else "batch_size=1"
            remedy = f"call cost(supernet, widths, {argument})"
            raise BudgetError.at(metric, got="a cost that was counted without it", needed="one with it", remedy=remedy)
        return value

    def to_dict(self) -> dict[str, float]:
        """Return the metrics that were counted, by name."""
        return {metric: value for metric, value in self.__dict__.items() if value is not None}


def cost(
    supernet: Supernet,
    widths: Widths | None = None,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    latency: Latency | None = None,
) -> Cost:
    """Return the cost of a subnet (the widest if no widths are given), without running it.

    MACs and parameters are always counted. The first `peak_bytes` at a batch size and type runs a few subnets on the
    meta device, which takes about as long as converting; all others take less than a millisecond. `latency_ms` needs a
    table.

    Args:
        supernet: the supernet.
        widths: the subnet.
        batch_size: images in a batch; asks for `peak_bytes`.
        dtype: type of weights and activations; asks for `peak_bytes`, of one image if no batch size is given.
        latency: predicts `latency_ms`, such as a `LatencyTable`; asks for it.

    Raises:
        WidthError: the widths are of another model.
        BudgetError: the batch size is not positive, the type no floating point type, or the latency predicts nothing.
        LatencyError: the table cannot measure here, or predicts no positive number.
        TraceError: the lifetimes of the tensors are unknown, because narrower subnets run other operators.
        ConfigError: the model is no supernet.
        ModelChangedError: its model has changed since it was converted.

    Example:
        >>> import timm
        >>> from timm_autoslim import convert
        >>> model = timm.create_model("resnet10t", num_classes=10)
        >>> supernet = convert(model, torch.zeros(1, 3, 32, 32))
        >>> cost(supernet, supernet.space.uniform(0.5), batch_size=8)
        Cost(macs=5639680, params=1234822, peak_bytes=5573736, latency_ms=None)
    """
    check_supernet(supernet)
    widths = supernet.space.check(widths if widths is not None else supernet.space.max())
    metrics = ["peak_bytes"] if batch_size is not None or dtype is not None else []
    metrics += ["latency_ms"] if latency is not None else []
    conditions = Conditions(1 if batch_size is None else batch_size, dtype, latency) if metrics else None
    return count_cost(supernet, widths, metrics, conditions)


def count_cost(
    supernet: Supernet, widths: Widths, metrics: Iterable[str] = (), conditions: Conditions | None = None
) -> Cost:
    """Return MACs, parameters and these metrics of a subnet; the arguments must be valid.

    Args:
        supernet: the supernet.
        widths: the subnet.
        metrics: keys of `METRICS`, each once.
        conditions: what they are counted for; None is one image, in the model's type.
    """
    conditions, graph = _USUAL if conditions is None else conditions, supernet.graph
    others: dict[str, Any] = {m: METRICS[m].count(supernet, widths, conditions) for m in metrics if m not in _ALWAYS}
    # not by way of the table: a search asks thousands of times
    return Cost(graph.macs(widths.values_), graph.params(widths.values_), **others)


_USUAL = Conditions()


def check_supernet(supernet: Any) -> None:
    """Raise ConfigError if this is no supernet, and ModelChangedError if its model is not the one it was made of."""
    if not isinstance(supernet, Supernet):
        got, needed = f"a {type(supernet).__name__}", "a Supernet, as convert(model) returns"
        raise ConfigError.at("the supernet", got=got, needed=needed)
    supernet.check_model()


def cost_by_module(supernet: Supernet, widths: Widths | None = None) -> dict[str, int]:
    """Return the MACs of every module that multiplies, in the order of execution.

    Raises:
        WidthError: the widths are of another model.
        ConfigError: the model is no supernet.
        ModelChangedError: its model has changed since it was converted.

    Example:
        >>> import timm
        >>> from timm_autoslim import convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> cost_by_module(supernet)["fc"]
        5120
    """
    check_supernet(supernet)
    values = supernet.space.check(widths if widths is not None else supernet.space.max()).values_
    macs: dict[str, float] = defaultdict(float)
    for product in supernet.graph.products:
        macs[product.path] += product.constant * prod(count(values) for count in product.counts)
    return {path: round(number) for path, number in macs.items()}
