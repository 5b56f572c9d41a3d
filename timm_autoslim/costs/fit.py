"""Fit predictions to measurements: which subnets are measured, and which factors predict their latency best."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths

ANCHORS = 8  # subnets that are measured, once for each model, to fit what the sum of operators leaves out


@dataclass(frozen=True)
class LatencyReport:
    """How far a table's predictions are from measurements.

    Attributes:
        widths: the subnets.
        measured_ms, predicted_ms: for each of them.

    Example:
        >>> report = LatencyReport((), measured_ms=(1.0, 2.0, 4.0), predicted_ms=(1.1, 2.0, 3.0))
        >>> round(report.median_error, 3), round(report.rank_correlation, 3)
        (0.1, 1.0)
    """

    widths: tuple[Widths, ...]
    measured_ms: tuple[float, ...]
    predicted_ms: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """The relative error of every prediction."""
        return tuple(abs(p / m - 1) for p, m in zip(self.predicted_ms, self.measured_ms, strict=True))

    @property
    def median_error(self) -> float:
        """The median of the relative errors."""
        return statistics.median(self.errors)

    @property
    def rank_correlation(self) -> float:
        """Spearman's rank correlation of predictions and measurements."""
        ranks = np.array([np.argsort(np.argsort(v)) for v in (self.predicted_ms, self.measured_ms)], np.float64)
        centred = ranks - ranks.mean(1, keepdims=True)
        return float((centred[0] * centred[1]).sum() / np.sqrt(np.square(centred).sum(1).prod()))


def choose_anchors(supernet: Supernet) -> list[Widths]:
    """Return the subnets that a fit measures: the widest, the narrowest, two uniform and random ones between."""
    space, generator = supernet.space, torch.Generator().manual_seed(0)
    anchors = dict.fromkeys([space.max(), space.min(), space.uniform(0.5), space.uniform(0.75)])
    for _ in range(10 * ANCHORS):  # a small space may have fewer
        if len(anchors) < ANCHORS:
            anchors[space.sample(generator)] = None
    return list(anchors)


def fit_factors(rows: NDArray[np.float64], measured: NDArray[np.float64]) -> list[float]:
    """Return factors of the columns, none of them negative, that predict the latency with least squared relative error.

    Args:
        rows: (N, K), the sums of each subnet, see `LatencyTable.add_up`.
        measured: (N,), their latency in milliseconds.
    """
    scaled, ones = rows / measured[:, None], np.ones(len(rows))
    best, least = [0.0] * rows.shape[1], float("inf")
    # the factors that are not zero solve the problem of their columns alone, and there are few sets of five columns
    for size in range(1, rows.shape[1] + 1):
        for columns in map(list, combinations(range(rows.shape[1]), size)):
            factors = np.linalg.lstsq(scaled[:, columns], ones, rcond=None)[0]
            error = float(np.square(scaled[:, columns] @ factors - 1).sum())
            if (factors >= 0).all() and error < least:
                least, best = error, [0.0] * rows.shape[1]
                for column, factor in zip(columns, factors, strict=True):
                    best[column] = float(factor)
    return best
