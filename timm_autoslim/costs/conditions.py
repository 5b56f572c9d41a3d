"""What memory and latency are counted for: a batch size, a type, and what predicts the latency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from timm_autoslim.errors import AutoSlimError, BudgetError, ConfigError
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.utils.arguments import check_dtype, check_integer, quote


class Latency(Protocol):
    """An object that predicts how long a subnet runs, such as a `LatencyTable`."""

    def predict(self, supernet: Supernet, widths: Widths) -> float:
        """Return the milliseconds that a subnet takes for one batch; equal widths must give equal times."""


@dataclass(frozen=True)
class Conditions:
    """What `peak_bytes` and `latency_ms` are counted for; MACs and parameters depend on none of it.

    Attributes:
        batch_size: images in a batch, for `peak_bytes`.
        dtype: type of weights and activations, for `peak_bytes`; None is that of the model.
        latency: predicts `latency_ms`, for the device, runtime, batch size and type that it was made for; None if no
            budget limits the latency.

    Raises:
        BudgetError: the batch size is not positive, the type no floating point type, or the latency predicts nothing.

    Example:
        >>> Conditions(batch_size=8, dtype=torch.float16)
        Conditions(batch_size=8, dtype=torch.float16, latency=None)
    """

    batch_size: int = 1
    dtype: torch.dtype | None = None
    latency: Latency | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", check_integer("batch_size", self.batch_size, BudgetError))
        check_dtype(self.dtype, BudgetError)
        check_latency(self.latency, BudgetError)


def check_latency(latency: object, error: type[AutoSlimError]) -> None:
    """Make sure that a latency predicts, or is None.

    Raises:
        AutoSlimError: of the type `error`: it has no method `predict`.
    """
    if latency is not None and not callable(getattr(latency, "predict", None)):
        needed = "an object with a method predict(supernet, widths), such as a LatencyTable, or None"
        raise error.at("latency", got=quote(latency), needed=needed)


def check_conditions(conditions: Conditions | None) -> Conditions:
    """Return conditions; None is one image, in the model's type.

    Raises:
        ConfigError: they are no `Conditions`.
    """
    if not isinstance(conditions, Conditions | None):
        raise ConfigError.at("conditions", got=quote(conditions), needed="Conditions, or None")
    return Conditions() if conditions is None else conditions
