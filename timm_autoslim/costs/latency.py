"""How long subnets take: predicted from a table of measured operators."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from timm_autoslim.costs.cost import check_supernet
from timm_autoslim.costs.measure import (
    Runtime,
    check_conditions,
    device_name,
    filled,
    measure_in_turns,
    running_threads,
    timed,
)
from timm_autoslim.costs.onnxruntime import onnxruntime_ms
from timm_autoslim.costs.tape import ATTENTION, Operator, TensorSpec
from timm_autoslim.errors import LatencyError
from timm_autoslim.supernet.space import Widths
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.utils.arguments import check_integer
from timm_autoslim.utils.files import write_text

FORMAT = 3
FACTORS = 5  # of a prediction
ANCHORS = 8  # subnets that are measured whole, once for each model, to fit what the sum of operators leaves out
# Operators whose kernels a runtime keeps; it fuses or removes most of the others.
_HEAVY = ("aten.convolution", "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", ATTENTION, "lstm", "gru", "rnn")


# -- operators ------------------------------------------------------------------------------------------------------


def _resolve(name: str) -> Callable[..., Any]:
    """Return the function that a tape's operator names."""
    if name == ATTENTION:
        return F.scaled_dot_product_attention
    if "." not in name:
        return getattr(torch, name)  # type: ignore[no-any-return]
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)  # type: ignore[no-any-return]


@cache
def _is_view(name: str) -> bool:
    """Whether an operator only looks at its input in another way."""
    function = _resolve(name)
    schema = getattr(function, "_schema", None)
    return schema is not None and any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)


def _text(value: Any) -> str:
    """Return arguments as a short text; equal texts take equal time."""
    if isinstance(value, TensorSpec):
        order = "" if value.order == tuple(range(len(value.shape))) else f"/{','.join(map(str, value.order))}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{order}".replace(" ", "")
    if isinstance(value, tuple):
        return f"({','.join(map(_text, value))})"
    if isinstance(value, dict):
        return "".join(f",{key}={_text(v)}" for key, v in value.items())
    return str(value)


def _made(value: Any, device: torch.device) -> Any:
    """Return arguments with tensors on the device in place of their specifications."""
    if isinstance(value, TensorSpec):
        laid = filled([value.shape[d] for d in value.order], value.dtype, device)
        return laid.permute([value.order.index(d) for d in range(len(value.shape))]) if value.order else laid
    if isinstance(value, tuple):
        return tuple(_made(v, device) for v in value)
    if isinstance(value, dict):
        return {key: _made(v, device) for key, v in value.items()}
    return device if isinstance(value, torch.device) else value


def _bytes(arguments: tuple[Any, ...]) -> int:
    """Return the bytes of all tensors among an operator's arguments."""
    return sum(
        prod(a.shape) * a.dtype.itemsize if isinstance(a, TensorSpec) else _bytes(a) if isinstance(a, tuple) else 0
        for a in arguments
    )


@dataclass(frozen=True)
class LatencyReport:
    """How far a table's predictions are from measurements.

    Attributes:
        widths: the subnets.
        measured_ms, predicted_ms: for each of them.
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


# -- the table ------------------------------------------------------------------------------------------------------


class LatencyTable:
    """Predicts the latency of subnets from measured operators; what it does not know yet, it measures.

    The operators of a subnet come from its tape (`Supernet.tape`). Each is measured once by itself, on arguments of the
    same shapes and types: for the runtime "onnxruntime" the heavy ones in ONNX Runtime, all others in eager mode. A
    prediction is `a + b * heavy + c * light + d * megabytes + e * heavy * megabytes`: the times of convolutions, matrix
    products, attention and recurrent layers added up, those of all other operators, and what the heavy ones read,
    weights included. An operator that is measured again and again finds that in the caches, and in a network the less
    so, the more the network reads. The five factors are none of them negative, and are fitted for each search space
    and runtime to the measured latency of a few whole subnets: they stand for what Python and the runtime add, for
    caches, and for what the runtime fuses.

    A table belongs to one processor or GPU, number of threads and version of torch. With a path it is read from there,
    and written back whenever something was measured.

    Attributes:
        device, threads, batch_size, dtype, runtime: what latency it predicts.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
        runtime: Runtime = "eager",
        threads: int = 1,
    ) -> None:
        """Open or start a table.

        Raises:
            LatencyError: an unknown device or runtime, or a file that is no table, or one of another device, number of
                threads or version of torch, or a path that cannot be written.
        """
        check_conditions(device, dtype, runtime, threads)
        self.device, self.dtype, self.runtime = torch.device(device), dtype, runtime
        self.batch_size, self.threads = check_integer("batch_size", batch_size, LatencyError), threads
        self.path = None if path is None else Path(path)
        self._made_for = {"device": device_name(device), "threads": threads, "torch": torch.__version__}
        self._inside = ""  # where heavy operators are measured, if not in eager mode
        if runtime == "onnxruntime":
            import onnxruntime

            self._inside = f"onnxruntime-{onnxruntime.__version__} "
        self._operators: dict[str, float] = {}
        self._fits: dict[str, list[float]] = {}
        self._predicted: dict[tuple[str, Widths], float] = {}
        if self.path is not None and self.path.exists():
            self._operators, self._fits = self._read(self.path)
        elif self.path is not None:
            _check_writable(self.path)

    def __len__(self) -> int:
        """Return how many operators have been measured."""
        return len(self._operators)

    def predict(self, supernet: Supernet, widths: Widths) -> float:
        """Return the latency of a subnet for one batch, in milliseconds.

        Operators that the table does not know are measured first, each for some 20 ms; for a model that it does not
        know, so are `ANCHORS` whole subnets.

        Raises:
            LatencyError: an operator cannot be measured by itself, or the supernet has no weights.
            TraceError: narrower subnets run other operators.
            WidthError: the widths are of another model.
            ConfigError: the model is no supernet.
        """
        model = self._model(supernet)
        key = model, supernet.space.check(widths)
        if key not in self._predicted:
            if model not in self._fits:
                self._fit(supernet)
            self._predicted[key] = float(np.dot(self._fits[model], self._sums(supernet, widths)))
        return self._predicted[key]

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
        """Measure these subnets, which should not be among the anchors, and compare the predictions.

        The anchors are measured again, in turns with these subnets, and the model is fitted anew: the report tells how
        well a fit predicts subnets that it has not seen, and not how much faster or slower the machine has become since
        an earlier fit.

        Raises:
            LatencyError: there are no subnets, or what `predict` raises.
        """
        if not subnets:
            raise LatencyError("report() got no subnets; needed: at least one, such as supernet.space.uniform(0.4)")
        measured = self._fit(supernet, subnets, rounds=rounds, repeats=repeats)
        predicted = [self.predict(supernet, widths) for widths in subnets]
        return LatencyReport(tuple(subnets), tuple(measured), tuple(predicted))

    # -- fitting ------------------------------------------------------------------------------------------------

    def _model(self, supernet: Supernet) -> str:
        """Return what a fit is kept under: runtime, the operators of the widest, and the space that anchors are of."""
        check_supernet(supernet)
        tape = supernet.tape(self.batch_size, self.dtype)
        operators = [f"{o.name}{_text(o.args)}{_text(o.kwargs)}" for o in tape.operators]
        text = "\n".join([supernet.space.id, *operators])
        return f"{self.runtime} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _fit(self, supernet: Supernet, others: Sequence[Widths] = (), **turns: int) -> list[float]:
        """Fit the factors to the anchors, measured in turns with other subnets; return the times of those."""
        model, known = self._model(supernet), anchors(supernet)
        # operators first: those that cannot be measured are told at once, and whole subnets follow each other closely
        rows = [self._sums(supernet, widths) for widths in [*known, *others]][: len(known)]
        times = self.measure(supernet, [*known, *others], **turns)
        self._fits[model] = fit_factors(np.array(rows), np.array(times[: len(known)]))
        self._predicted = {key: ms for key, ms in self._predicted.items() if key[0] != model}
        self._write()
        return times[len(known) :]

    def _key(self, operator: Operator) -> str:
        """Return what an operator's time is kept under."""
        inside = self._inside if operator.name.startswith(_HEAVY) else ""
        return f"{inside}{operator.name}{_text(operator.args)}{_text(operator.kwargs)}"

    def _named(self, supernet: Supernet, widths: Widths) -> list[tuple[str, Operator]]:
        """Return the operators of a subnet that compute something, each with its key in the table."""
        found = supernet.tape(self.batch_size, self.dtype).operators_at(widths.values_)
        return [(self._key(o), o) for o in found if not _is_view(o.name)]

    def _sums(self, supernet: Supernet, widths: Widths) -> tuple[float, ...]:
        """Return what a prediction is made of: one sum for each of its factors, of which the first is 1."""
        named = self._named(supernet, widths)
        new = {key: operator for key, operator in named if key not in self._operators}
        for key, operator in new.items():
            self._operators[key] = self._measured(operator)
        if new:
            self._write()
        heavy = [(key, o) for key, o in named if o.name.startswith(_HEAVY)]
        times = [sum(self._operators[key] for key, _ in part) for part in (heavy, named)]
        megabytes = sum(_bytes(o.args) for _, o in heavy) / 1e6
        return 1.0, times[0], times[1] - times[0], megabytes, times[0] * megabytes

    def _measured(self, operator: Operator) -> float:
        function = _resolve(operator.name)
        with running_threads(self.threads), torch.no_grad():
            try:
                inside = self._inside and operator.name.startswith(_HEAVY)
                if inside and (found := onnxruntime_ms(operator, self.threads)) is not None:
                    return found
                args, kwargs = _made(operator.args, self.device), _made(operator.kwargs, self.device)
                return timed(lambda: function(*args, **kwargs), self.device, 5, 0.002)
            except Exception as error:  # whatever an operator says to made-up arguments
                raise LatencyError(
                    f"{operator.path or 'the model'}: {operator.name} cannot be measured by itself "
                    f"({type(error).__name__}: {str(error)[:200]}); measure whole subnets with measure_latency"
                ) from error

    # -- the file -----------------------------------------------------------------------------------------------

    def _read(self, path: Path) -> tuple[dict[str, float], dict[str, list[float]]]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            number, made_for = found["format"], {key: found[key] for key in self._made_for}
            operators, fits = dict(found["operators"]), dict(found["fits"])
            _check_times("operators", operators.values())
            _check_times("fits", [factor for factors in fits.values() for factor in _factors(factors)])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LatencyError(
                f"{path}: is no latency table ({type(error).__name__}: {error}); give the path of a table, or of a new "
                "file"
            ) from None
        if number != FORMAT:
            raise LatencyError(f"{path}: got a latency table of format {number!r}; needed: format {FORMAT}")
        for key, here in self._made_for.items():
            if made_for[key] != here:
                raise LatencyError(
                    f"{path}: this latency table was measured with {key} {made_for[key]!r}, and asked for is {here!r}; "
                    "give another path, and a table for this one is measured there"
                )
        return operators, fits

    def _write(self) -> None:
        """Write the table, with what others have added to the file meanwhile, in one step."""
        if self.path is None:
            return
        if self.path.exists():
            operators, fits = self._read(self.path)
            self._operators, self._fits = {**operators, **self._operators}, {**fits, **self._fits}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"format": FORMAT, **self._made_for, "operators": self._operators, "fits": self._fits}, indent=0
        )
        write_text(self.path, text)


def _check_times(where: str, values: Iterable[Any]) -> None:
    """Raise ValueError for a value that no measurement has."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"{where}: got {value!r}, needed are numbers that are finite and not negative")


def _factors(factors: Any) -> list[Any]:
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


def anchors(supernet: Supernet) -> list[Widths]:
    """Return the subnets that a fit measures: the widest, the narrowest, two uniform and random ones between."""
    space, generator = supernet.space, torch.Generator().manual_seed(0)
    found = dict.fromkeys([space.max(), space.min(), space.uniform(0.5), space.uniform(0.75)])
    for _ in range(10 * ANCHORS):  # a small space may have fewer
        if len(found) < ANCHORS:
            found[space.sample(generator)] = None
    return list(found)


def fit_factors(rows: NDArray[np.float64], measured: NDArray[np.float64]) -> list[float]:
    """Return factors of the columns, none of them negative, that predict the latency with least squared relative error.

    Args:
        rows: (N, K), what was added up for each subnet.
        measured: (N,), their latency in milliseconds.
    """
    scaled, ones = rows / measured[:, None], np.ones(len(rows))
    best, least = [0.0] * rows.shape[1], float("inf")
    # the factors that are not zero solve the problem of their columns alone, and all sets of five columns are few
    for size in range(1, rows.shape[1] + 1):
        for chosen in map(list, combinations(range(rows.shape[1]), size)):
            factors = np.linalg.lstsq(scaled[:, chosen], ones, rcond=None)[0]
            left = float(np.square(scaled[:, chosen] @ factors - 1).sum())
            if (factors >= 0).all() and left < least:
                least, best = left, [0.0] * rows.shape[1]
                for column, factor in zip(chosen, factors, strict=True):
                    best[column] = float(factor)
    return best
