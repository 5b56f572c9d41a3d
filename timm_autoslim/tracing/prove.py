"""Run subnets beside the recorded whole model, and find what disagrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_autoslim.slicing import slices as slicing
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.ops import recurrent
from timm_autoslim.utils.meta import call, seeded, sized, tensors_in


@dataclass(frozen=True)
class Operation:
    """One operator of the recorded run, with every label that it saw."""

    name: str
    path: str
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Exit:
    """What left one module in the recorded run."""

    path: str
    shapes: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[Label, ...], ...]


@dataclass(frozen=True)
class Record:
    """One recorded run of the whole model."""

    training: bool
    operations: tuple[Operation, ...]
    exits: tuple[Exit, ...]


class Disagreement(Exception):
    """A subnet did not do what the graph says: the module, the operator if one failed, and whether half width did."""

    def __init__(self, message: str, path: str, operator: str | None = None, labels: Sequence[Label] = ()) -> None:
        super().__init__(message)
        self.path, self.operator, self.labels = path, operator, labels
        self.narrow = False


class _Lockstep(TorchDispatchMode):
    """Run a subnet beside the record: the same modules, and every output as long as the graph says.

    Modules are compared and not operators, because torch inserts and leaves out operators as strides allow.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scope: list[str] = []
        self.exits: tuple[Exit, ...] = ()
        self.active: NDArray[np.bool_] = np.zeros(0, bool)
        self.at = 0
        for path, module in plain.named_modules():
            module.register_forward_pre_hook(self._enter(path))
            module.register_forward_hook(self._leave(path))

    def start(self, record: Record, active: NDArray[np.bool_]) -> _Lockstep:
        """Compare the next run with this record."""
        self.exits, self.active, self.at, self.scope = record.exits, active, 0, [""]
        return self

    def _enter(self, path: str) -> Callable[..., None]:
        return lambda module, args: self.scope.append(path)

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.scope.pop()
            due = self.exits[min(self.at, len(self.exits) - 1)]
            self.at += 1
            if due.path != path:
                raise Disagreement(f"runs this module where the whole model runs {due.path}", path)
            for tensor, labels, shape in zip(tensors_in(out), due.labels, due.shapes, strict=True):
                want = tuple(n if v is None else int(self.active[v].sum()) for n, v in zip(shape, labels, strict=True))
                if tuple(tensor.shape) != want:
                    raise Disagreement(
                        f"gives the shape {tuple(tensor.shape)} where {want} was due", path, None, labels
                    )

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return ops.execute(func, args, kwargs or {})
        except Exception as error:
            raise Disagreement(f"{func} fails: {error}", self.scope[-1], str(func)) from error


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
    """Runs a model without data as any subnet, and compares it with the records of the whole."""

    def __init__(self, plain: nn.Module, example: Any, records: Sequence[Record]) -> None:
        self.plain, self.example, self.records = plain, example, records
        self.lockstep = _Lockstep(plain)

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
        self.plain.train(record.training)
        example = sized(self.example, 2 if record.training else 1)
        lockstep = self.lockstep.start(record, graph.active(widths))
        try:
            with (
                torch.no_grad(),
                seeded(),
                slicing.applied(self.plain, graph.slices(widths)),
                recurrent.Shapes(),
                lockstep,
            ):
                call(self.plain, example)
        except Disagreement:
            raise
        except Exception as error:
            raise Disagreement(f"raises {type(error).__name__}: {error}", lockstep.scope[-1]) from error
