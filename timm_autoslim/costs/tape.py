"""What one forward of a subnet does, as functions of the widths: its operators, and how long its tensors live.

A tape is recorded on the meta device from a few subnets of one model. The same operators run in all of them, and every
number that differs (lengths of tensors, sizes among the arguments) is found among the active lengths of the channel
graph. Reading it at any widths then takes a few array operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from timm_autoslim.costs.infer import FormulaFinder
from timm_autoslim.costs.recorder import Operator, Storage, TapeRecorder, collect_numbers, replace_numbers
from timm_autoslim.errors import AutoSlimError, TraceError, quote_error
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.tracing.formulas import Numbers, Row, Terms
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.outer_state import with_empty_caches
from timm_autoslim.tracing.record import Recorder
from timm_autoslim.utils.meta import copy_to_meta, count_images, make_meta_example
from timm_autoslim.utils.tensors import collect_tensors, map_tensors, named_tensors

RUNS = 4  # subnets beside the widest that a tape is recorded from; one more each time two lengths look alike
MAX_RUNS = 10

# By batch size, type, and type of the weights.
_Tapes = dict[tuple[int, torch.dtype | None, torch.dtype | None], "Tape"]
_TAPES: WeakKeyDictionary[Supernet, _Tapes] = WeakKeyDictionary()


def get_tape(supernet: Supernet, batch_size: int = 1, dtype: torch.dtype | None = None) -> Tape:
    """Return what one forward in eval mode does, as functions of the widths; the first call records it.

    Args:
        supernet: the supernet.
        batch_size: images in a batch.
        dtype: type of weights and activations; None is that of the model.

    Raises:
        TraceError: narrower subnets run other operators than the widest, or the model does not take this batch size.
    """
    tapes = _TAPES.setdefault(supernet, {})
    key = batch_size, dtype, next((p.dtype for p in supernet.model.parameters() if p.is_floating_point()), None)
    if key not in tapes or tapes[key].graph is not supernet.graph:
        example = supernet.example(batch_size)
        try:
            tapes[key] = Tape(supernet.model, example, supernet.graph, dtype)
        except AutoSlimError:
            raise
        except Exception as error:
            got = f"{batch_size}, with which the forward raises {type(error).__name__} ({quote_error(error)})"
            needed = f"a batch that the model takes, such as {supernet.traced_batch_size}"
            raise TraceError.at("batch_size", got=got, needed=needed) from error
    return tapes[key]


@dataclass(frozen=True)
class Run:
    """What one forward of one subnet did."""

    operators: list[Operator]
    storages: list[Storage]

    def peak(self) -> int:
        """Return the most bytes that its storages took at once."""
        sizes = [prod(s.numbers) * (s.unless_equal is None or len(set(s.unless_equal)) > 1) for s in self.storages]
        return _largest_sum(self.storages, len(self.operators), np.array(sizes, np.int64))

    def structure(self) -> tuple[Any, ...]:
        """Return what must be the same in all runs."""
        return (
            [(o.name, sum(1 for _ in collect_numbers((o.args, o.kwargs)))) for o in self.operators],
            [(len(s.numbers), s.born, s.last) for s in self.storages],
        )

    def numbers(self) -> tuple[list[int], list[int]]:
        """Return every number of the operators, and of the storages."""
        return (
            [n for o in self.operators for n in collect_numbers((o.args, o.kwargs))],
            [n for s in self.storages for n in (*s.numbers, *(s.unless_equal or ()))],
        )


def _largest_sum(storages: Sequence[Storage], operators: int, sizes: Numbers) -> int:
    """Return the most that storages of these sizes take at once."""
    change: Numbers = np.zeros(operators + 1, np.int64)
    np.add.at(change, [s.born for s in storages], sizes)
    np.subtract.at(change, [s.last + 1 for s in storages], sizes)
    return int(np.cumsum(change).max(initial=0))


class Tape:
    """One forward in eval mode at one batch size and type, as functions of the widths.

    Attributes:
        graph: the channel graph, whose groups have the widths.
        operators: what ran, in its order, with the arguments of the widest.
    """

    def __init__(self, model: nn.Module, example: Any, graph: ChannelGraph, dtype: torch.dtype | None = None) -> None:
        """Record a model.

        Raises:
            TraceError: narrower subnets run other operators than the widest.
        """
        self.graph = graph
        meta_copy = with_empty_caches(model, lambda _: copy_to_meta(model)).eval()
        example = make_meta_example(example, count_images(example))
        if dtype is not None:
            meta_copy = meta_copy.to(dtype)
            example = map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, example)
        self._inputs = sum(t.untyped_storage().nbytes() for t in collect_tensors(example))
        data = named_tensors(model)
        runs = with_empty_caches(model, lambda _: _record_runs(meta_copy, example, graph, data))
        # after the runs: some modules keep tensors from then on
        self._weights = graph.make_size_terms(
            {n: (t.element_size(), *t.shape) for n, t in named_tensors(meta_copy).items()}
        )
        self.operators = runs[0][1].operators
        self._storages = runs[0][1].storages
        finder = FormulaFinder(graph, [widths for widths, _ in runs])
        columns = [run.numbers() for _, run in runs]
        arguments = _find_rows(finder, list(zip(*(c[0] for c in columns), strict=True)))
        sizes = _find_rows(finder, list(zip(*(c[1] for c in columns), strict=True)))
        groups = len(graph.group_sizes)
        self._arguments = Terms(finder.lengths, groups, arguments)
        self._sizes, self._unless_equal = _make_size_terms(self._storages, finder, groups, sizes)

    def peak_bytes(self, widths: Sequence[int]) -> int:
        """Return the bytes of weights and inputs, and the most that all other tensors take at once."""
        sizes = self._sizes(widths)
        for i, terms in self._unless_equal:
            one, other = terms(widths)
            sizes[i] *= one != other
        return self.constant_bytes(widths) + _largest_sum(self._storages, len(self.operators), sizes)

    def constant_bytes(self, widths: Sequence[int]) -> int:
        """Return the bytes of weights and inputs, which are there all the time."""
        return int(self._weights(widths).sum()) + self._inputs

    def operators_at(self, widths: Sequence[int]) -> list[Operator]:
        """Return the operators with the arguments that they have at these widths."""
        numbers = iter(self._arguments(widths).tolist())
        operators = []
        for o in self.operators:
            args, kwargs = replace_numbers((o.args, o.kwargs), numbers)
            operators.append(Operator(o.name, o.path, args, kwargs))
        return operators


def _find_rows(finder: FormulaFinder, numbers: Sequence[tuple[int, ...]]) -> list[Row]:
    rows = []
    for values in numbers:
        row = finder.find(values)
        if row is None:
            raise TraceError(
                f"the model: a length that is {values} at the widths tried is no product or sum of channel counts, "
                "so peak_bytes and latency_ms are unknown"
            )
        rows.append(row)
    return rows


def _make_size_terms(
    storages: Sequence[Storage], finder: FormulaFinder, groups: int, rows: Sequence[Row]
) -> tuple[Terms, list[tuple[int, Terms]]]:
    """Return the sizes of all storages, and for those that are there only sometimes the two numbers that decide."""
    products, conditions, at = [], [], 0
    for i, storage in enumerate(storages):
        parts = rows[at : at + len(storage.numbers)]
        at += len(storage.numbers)
        scale, divisor = prod(s for s, _, _ in parts), prod(d for _, d, _ in parts)
        products.append((scale, divisor, tuple(k for _, _, factors in parts for k in factors)))
        if storage.unless_equal is not None:
            conditions.append((i, Terms(finder.lengths, groups, rows[at : at + 2])))
            at += 2
    return Terms(finder.lengths, groups, products), conditions


# -- recording ------------------------------------------------------------------------------------------------------


def _record_runs(
    meta_copy: nn.Module, example: Any, graph: ChannelGraph, data: Mapping[str, Tensor]
) -> list[tuple[list[int], Run]]:
    """Run the widest and as many random subnets as tell all lengths apart; return widths and runs.

    Raises:
        TraceError: subnets run other operators than the widest.
    """
    rng = np.random.default_rng(0)
    sizes = list(graph.group_sizes)
    _warm_up(meta_copy, example, data)
    runs = [(sizes, _record(meta_copy, example, graph, sizes, data))]
    structure = runs[0][1].structure()
    while len(runs) <= MAX_RUNS:
        lows = [max(low, n // 2, min(n - 1, 2)) for low, n in zip(graph.floors, sizes, strict=True)]  # 1 is no length
        widths = [int(rng.integers(low, n + 1)) for low, n in zip(lows, sizes, strict=True)]
        run = _record(meta_copy, example, graph, widths, data)
        if run.structure() != structure:
            # It filled a cache that is kept outside of the model, as the warm-up did for the widest.
            run = _record(meta_copy, example, graph, widths, data)
        runs.append((widths, run))
        if run.structure() != structure:
            raise TraceError(
                "the model: narrower subnets run other operators than the widest, so peak_bytes and latency_ms are "
                "unknown"
            )
        if len(runs) > RUNS and not FormulaFinder(graph, [w for w, _ in runs]).is_ambiguous():
            break
    return runs


def record(model: nn.Module, example: Any, graph: ChannelGraph, widths: Sequence[int]) -> Run:
    """Return what one forward of the subnet of these widths does, on inputs of the example's shapes."""
    meta_copy = with_empty_caches(model, lambda _: copy_to_meta(model)).eval()
    data = named_tensors(model)

    def run(_: object) -> Run:
        _warm_up(meta_copy, example, data)
        return _record(meta_copy, example, graph, widths, data)

    return with_empty_caches(model, run)


def _warm_up(meta_copy: nn.Module, example: Any, data: Mapping[str, Tensor]) -> None:
    """Run the model once: some modules keep tensors that they make in their first run."""
    recorder = Recorder(meta_copy, data=data)
    try:
        recorder.run(example)
    finally:
        recorder.stack.release()


def _record(
    meta_copy: nn.Module, example: Any, graph: ChannelGraph, widths: Sequence[int], data: Mapping[str, Tensor]
) -> Run:
    recorder = TapeRecorder(replicate(meta_copy, graph.slices(widths)), example, data)
    out = recorder.run(example)
    recorder.finish()
    del out
    return Run(recorder.operators, recorder.storages)
