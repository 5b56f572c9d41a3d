"""How long subnets take: predicted from a table of measured operators."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from timm_autoslim.costs.cost import check_supernet
from timm_autoslim.costs.fit import LatencyReport, choose_anchors, fit_factors
from timm_autoslim.costs.measure import check_settings, measure_in_turns, name_device
from timm_autoslim.costs.operators import count_bytes, format_operator, is_heavy, is_timed_in, is_view, measure_operator
from timm_autoslim.costs.recorder import Operator
from timm_autoslim.costs.runtimes import RUNTIMES
from timm_autoslim.costs.tape import get_tape
from timm_autoslim.errors import LatencyError
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.utils.arguments import check_integer, check_path
from timm_autoslim.utils.files import lock_folder, write_text

FORMAT = 3
FACTORS = 5  # of a prediction


class LatencyTable:
    """Predicts the latency of subnets from measured operators; it measures those that it does not have yet.

    Each operator of a subnet is measured once by itself, on arguments of the same shapes and types: for the runtime
    "onnxruntime" the heavy ones in ONNX Runtime, all others in eager mode. A prediction is `a + b * heavy + c * light +
    d * megabytes + e * heavy * megabytes`: the times of convolutions, matrix products, attention and recurrent layers
    added up, those of all other operators, and what the heavy ones read, weights included. An operator that is measured
    again and again finds that in the caches, and in a network the less so, the more the network reads. The five factors
    are none of them negative, and are fitted for each search space and runtime to the measured latency of a few
    subnets: they stand for what Python and the runtime add, for caches, and for what the runtime fuses.

    A table belongs to one processor or GPU, number of threads and version of torch. With a path it is read from there,
    and written back whenever something was measured.

    Attributes:
        device, threads, batch_size, dtype, runtime: what latency it predicts.

    Example:
        >>> table = LatencyTable(batch_size=8)
        >>> (table.device, table.runtime, len(table))
        (device(type='cpu'), 'eager', 0)
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
        runtime: str = "eager",
        threads: int = 1,
    ) -> None:
        """Open or start a table.

        Raises:
            LatencyError: an unknown device or runtime, or a file that is no table, or one of another device, number of
                threads or version of torch, or a path that cannot be written.
        """
        check_settings(device, dtype, runtime, threads)
        self.device, self.dtype, self.runtime = torch.device(device), dtype, runtime
        self.batch_size, self.threads = check_integer("batch_size", batch_size, LatencyError), threads
        self.path = None if path is None else check_path("path", path, LatencyError)
        self._machine = {"device": name_device(device), "threads": threads, "torch": torch.__version__}
        self._version = RUNTIMES[runtime].version()
        self._operators: dict[str, float] = {}
        self._fits: dict[str, list[float]] = {}
        self._predictions: dict[tuple[str, Widths], float] = {}
        if self.path is not None and self.path.exists():
            self._operators, self._fits = self._read(self.path)
        elif self.path is not None:
            _check_writable(self.path)

    def __len__(self) -> int:
        """Return how many operators have been measured."""
        return len(self._operators)

    @property
    def operators(self) -> Mapping[str, float]:
        """The milliseconds of every operator that has been measured."""
        return MappingProxyType(self._operators)

    def predict(self, supernet: Supernet, widths: Widths) -> float:
        """Return the latency of a subnet for one batch, in milliseconds.

        Operators that the table does not have are measured first, each for some 20 ms; for a model that it has not
        been fitted to, so are a few subnets.

        Raises:
            LatencyError: an operator cannot be measured by itself, or the supernet has no weights.
            TraceError: narrower subnets run other operators.
            WidthError: the widths are of another model.
            ConfigError: the model is no supernet.
        """
        model = self._name_model(supernet)
        key = model, supernet.space.check(widths)
        if key not in self._predictions:
            if model not in self._fits:
                self._fit(supernet)
            self._predictions[key] = float(np.dot(self._fits[model], self.add_up(supernet, widths)))
        return self._predictions[key]

    def measure(self, supernet: Supernet, subnets: Sequence[Widths], rounds: int = 5, repeats: int = 10) -> list[float]:
        """Return the latency of subnets under the table's conditions, in milliseconds, measured in turns.

        All of them are extracted at once, and each has a turn in every round: on a machine whose speed changes, times
        can be compared only with others of the same minute.
        """
        return measure_in_turns(
            (supernet.extract(widths) for widths in subnets),
            supernet.example(self.batch_size),
            device=self.device,
            dtype=self.dtype,
            runtime=self.runtime,
            threads=self.threads,
            rounds=rounds,
            repeats=repeats,
        )

    def report(
        self, supernet: Supernet, subnets: Sequence[Widths], rounds: int = 5, repeats: int = 10
    ) -> LatencyReport:
        """Measure these subnets, which should not be among those of a fit, and compare the predictions.

        The subnets of the fit are measured again, in turns with these, and the table is fitted anew: the report tells
        how well a fit predicts other subnets, and not how much faster or slower the machine has become since an earlier
        fit.

        Raises:
            LatencyError: there are no subnets, or what `predict` raises.
        """
        if not subnets:
            needed = "at least one subnet, such as supernet.space.uniform(0.4)"
            raise LatencyError.at("report()", got="no subnets", needed=needed)
        measured = self._fit(supernet, subnets, rounds=rounds, repeats=repeats)
        predicted = [self.predict(supernet, widths) for widths in subnets]
        return LatencyReport(tuple(subnets), tuple(measured), tuple(predicted))

    def add_up(self, supernet: Supernet, widths: Widths) -> tuple[float, ...]:
        """Return what a prediction is made of: one sum for each of its factors, of which the first is 1.

        Raises:
            LatencyError: an operator cannot be measured by itself.
        """
        operators = self._list_operators(supernet, widths)
        new = {key: operator for key, operator in operators if key not in self._operators}
        for key, operator in new.items():
            self._operators[key] = measure_operator(operator, RUNTIMES[self.runtime], self.device, self.threads)
        if new:
            self._write()
        heavy = [(key, operator) for key, operator in operators if is_heavy(operator)]
        heavy_ms, all_ms = (sum(self._operators[key] for key, _ in part) for part in (heavy, operators))
        megabytes = sum(count_bytes(operator.args) for _, operator in heavy) / 1e6
        return 1.0, heavy_ms, all_ms - heavy_ms, megabytes, heavy_ms * megabytes

    # -- fitting ------------------------------------------------------------------------------------------------

    def _name_model(self, supernet: Supernet) -> str:
        """Return the key of a fit: runtime, the operators of the widest, and the search space."""
        check_supernet(supernet)
        operators = map(format_operator, get_tape(supernet, self.batch_size, self.dtype).operators)
        text = "\n".join([supernet.space.id, *operators])
        return f"{self.runtime} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _fit(self, supernet: Supernet, others: Sequence[Widths] = (), **turns: int) -> list[float]:
        """Fit the factors to the anchors, measured in turns with other subnets; return the times of those."""
        model, anchors = self._name_model(supernet), choose_anchors(supernet)
        # operators first: one that cannot be measured is told at once, and the subnets follow each other closely
        rows = [self.add_up(supernet, widths) for widths in [*anchors, *others]][: len(anchors)]
        times = self.measure(supernet, [*anchors, *others], **turns)
        self._fits[model] = fit_factors(np.array(rows), np.array(times[: len(anchors)]))
        self._predictions = {key: ms for key, ms in self._predictions.items() if key[0] != model}
        self._write()
        return times[len(anchors) :]

    def _list_operators(self, supernet: Supernet, widths: Widths) -> list[tuple[str, Operator]]:
        """Return the operators of a subnet that compute something, each with its key in the table."""
        operators = get_tape(supernet, self.batch_size, self.dtype).operators_at(widths.values_)
        return [(self._make_key(operator), operator) for operator in operators if not is_view(operator.name)]

    def _make_key(self, operator: Operator) -> str:
        separate = self._version and is_timed_in(RUNTIMES[self.runtime], operator)
        version = f"{self._version} " if separate else ""
        return f"{version}{format_operator(operator)}"

    # -- the file -----------------------------------------------------------------------------------------------

    def _read(self, path: Path) -> tuple[dict[str, float], dict[str, list[float]]]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            number, machine = content["format"], {key: content[key] for key in self._machine}
            operators, fits = dict(content["operators"]), dict(content["fits"])
            _check_times("operators", operators.values())
            _check_times("fits", [factor for factors in fits.values() for factor in _check_length(factors)])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LatencyError(
                f"{path}: is no latency table ({type(error).__name__}: {error}); give the path of a table, or of a new "
                "file"
            ) from None
        if number != FORMAT:
            raise LatencyError.at(str(path), got=f"a latency table of format {number!r}", needed=f"format {FORMAT}")
        for key, here in self._machine.items():
            if machine[key] != here:
                got, needed = f"a latency table that was measured with {key} {machine[key]!r}", f"{key} {here!r}"
                remedy = "give another path, and a table for this one is measured there"
                raise LatencyError.at(str(path), got=got, needed=needed, remedy=remedy)
        return operators, fits

    def _write(self) -> None:
        """Write the table, with what others have added to the file meanwhile, in one step."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.path.parent):  # so that nobody writes between the reading and the writing
            if self.path.exists():
                operators, fits = self._read(self.path)
                self._operators, self._fits = {**operators, **self._operators}, {**fits, **self._fits}
            content = {"format": FORMAT, **self._machine, "operators": self._operators, "fits": self._fits}
            write_text(self.path, json.dumps(content, indent=0))


def _check_times(where: str, values: Iterable[Any]) -> None:
    """Raise ValueError for a value that is no time."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"{where}: got {value!r}, needed are numbers that are finite and not negative")


def _check_length(factors: Any) -> list[Any]:
    if not isinstance(factors, list) or len(factors) != FACTORS:
        raise ValueError(f"fits: got {factors!r}, needed are {FACTORS} factors")
    return factors


def _check_writable(path: Path) -> None:
    """Raise LatencyError where no file can be made: better before anything is measured than after."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LatencyError(
            f"{path}: this latency table cannot be written in {folder} ({error}); give a path that can be written"
        ) from None
