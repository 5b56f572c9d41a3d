"""Prove a channel graph: run subnets beside the record of the widest, and find what disagrees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from timm_autoslim.slicing.replica import replicate
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.record import Record, Recorder
from timm_autoslim.utils.meta import make_meta_example
from timm_autoslim.utils.tensors import collect_tensors


class Disagreement(Exception):
    """A subnet did not do what the graph says: the module, the operator if one failed, and whether half width did."""

    def __init__(self, message: str, path: str, operator: str | None = None, labels: Sequence[Label] = ()) -> None:
        super().__init__(message)
        self.path, self.operator, self.labels = path, operator, labels
        self.narrow = False


class _Lockstep(Recorder):
    """Runs a subnet beside the record: the same modules, and every output as long as the graph says.

    Modules are compared and not operators, because torch inserts and leaves out operators as strides allow.
    """

    def __init__(self, subnet: nn.Module, record: Record, active: NDArray[np.bool_]) -> None:
        """Compare the next run of `subnet` with a record; `active` says which atoms it has."""
        super().__init__(subnet)
        self.exits, self.active, self.position = record.exits, active, 0

    def leave(self, path: str, module: nn.Module, out: Any) -> None:
        """Compare what a module returns with what it returned in the record."""
        expected = self.exits[min(self.position, len(self.exits) - 1)]
        self.position += 1
        if expected.path != path:
            raise Disagreement(f"runs this module where the widest runs {expected.path}", path)
        for tensor, labels, shape in zip(collect_tensors(out), expected.labels, expected.shapes, strict=True):
            length = tuple(n if v is None else int(self.active[v].sum()) for n, v in zip(shape, labels, strict=True))
            if tuple(tensor.shape) != length:
                raise Disagreement(f"gives the shape {tuple(tensor.shape)} where {length} was due", path, None, labels)

    def operator(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator; if it cannot run on these shapes, the subnet disagrees."""
        try:
            return super().operator(func, args, kwargs)
        except Exception as error:
            raise Disagreement(f"{func} fails: {error}", self.stack.path, str(func)) from error


def suspects(records: Sequence[Record], fault: Disagreement) -> Iterator[list[Label]]:
    """Yield ever wider sets of labels that may be at fault: the operator's, the module's, its parents'."""
    seen = [o for run in records for o in run.operations]
    yield [v for o in seen if o.path == fault.path and o.name == fault.operator for v in o.labels]
    yield list(fault.labels)
    path = fault.path
    while True:
        yield [v for o in seen if o.path == path for v in o.labels]
        inside = [v for o in seen if o.path == path or o.path.startswith(path + ".") or not path for v in o.labels]
        yield inside
        if not path:
            return
        path = path.rpartition(".")[0]


class Prover:
    """Runs a meta copy of a model as any subnet, and compares it with the records of the widest."""

    def __init__(self, model: nn.Module, example: Any, records: Sequence[Record]) -> None:
        self.model, self.example, self.records = model, example, records

    def faults(self, graph: ChannelGraph) -> Iterator[Disagreement]:
        """Yield what disagrees at half, at the narrowest and at random widths, in both modes."""
        rng = np.random.default_rng(0)
        sizes, floors = graph.group_sizes, graph.floors
        half = [max(1, n // 2) for n in sizes]
        mixed = [[int(rng.integers(low, n + 1)) for low, n in zip(floors, sizes, strict=True)] for _ in range(2)]
        for widths in (half, floors, *mixed):
            for record in self.records:
                try:
                    self._try(graph, widths, record)
                except Disagreement as fault:
                    fault.narrow = widths is not half
                    yield fault

    def _try(self, graph: ChannelGraph, widths: Sequence[int], record: Record) -> None:
        self.model.train(record.training)
        example = make_meta_example(self.example, 2 if record.training else 1)
        lockstep = _Lockstep(replicate(self.model, graph.slices(widths)), record, graph.active(widths))
        try:
            lockstep.run(example)
        except Disagreement:
            raise
        except Exception as error:
            path = lockstep.stack.interrupted or ""
            raise Disagreement(f"raises {type(error).__name__}: {error}", path) from error
