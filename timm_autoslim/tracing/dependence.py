"""Which weights a model's outputs depend on: a branch whose result is dropped runs, but for nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from timm_autoslim.tracing.ops.schema import OperatorCall, list_written, tensors_in_lists


class Dependence:
    """What the operators of one run have read and written, by the memory of tensors, which views share."""

    def __init__(self) -> None:
        self._steps: list[tuple[set[int], set[int]]] = []  # (read, written)
        self._storages: dict[int, Any] = {}  # kept, so that no other gets its number
        self._reads: set[int] = set()  # what the model's code has read as numbers
        self.is_over = False

    def start(self) -> None:
        """Forget the last run."""
        self._steps.clear()
        self._storages.clear()
        self._reads.clear()
        self.is_over = False

    def note(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor], is_view: bool = False) -> None:
        """Note that something computes tensors from others, or writes to them."""
        if not (self.is_over or is_view):
            self._steps.append((set(map(self._find, inputs)), set(map(self._find, outputs))))

    def note_operator(self, func: torch._ops.OpOverload, op: OperatorCall) -> None:
        """Note one operator. Running statistics, which it writes but does not return, are no results.

        The results of one that returns nothing, such as `_foreach_add_`, are what it writes.
        """
        results = op.out if func._schema.returns else [op[name] for name in list_written(func)]
        self.note(op.tensors, tensors_in_lists(results), func.is_view)

    def note_read(self, tensor: Tensor) -> None:
        """Note that the model's code reads the numbers of a tensor, and so may do anything with them."""
        self._reads.add(self._find(tensor))

    def list_live(self, outputs: Iterable[Tensor], state: Iterable[Tensor], weights: Sequence[Tensor]) -> set[int]:
        """Return the ids of those weights that outputs depend on, or what the model keeps for its next call.

        Args:
            outputs: of the run.
            state: tensors of the model that a run may write.
            weights: the ones that are asked about.
        """
        live = self._reads | {self._find(tensor) for tensor in (*outputs, *state)}
        for read, written in reversed(self._steps):
            if not live.isdisjoint(written):
                live |= read
        return {id(weight) for weight in weights if self._find(weight) in live}

    def _find(self, tensor: Tensor) -> int:
        try:
            storage: Any = tensor.untyped_storage()
            number: int = storage._cdata
        except (NotImplementedError, RuntimeError):  # a sparse tensor, for one, has none
            storage, number = tensor, id(tensor)
        self._storages.setdefault(number, storage)
        return number


def name_parts(names: Collection[str], every: Collection[str]) -> list[str]:
    """Return the modules that hold these weights and no others, the outermost of them; else the weights.

    Args:
        names: of some weights.
        every: the names of all weights.

    Example:
        >>> name_parts(["aux.0.w", "aux.1.w", "b.bias"], ["a.w", "aux.0.w", "aux.1.w", "b.bias", "b.w"])
        ['aux', 'b.bias']
    """
    others = [name for name in every if name not in names]
    parts: dict[str, None] = {}
    for name in names:
        steps = name.split(".")
        prefixes = [".".join(steps[:end]) for end in range(1, len(steps))]
        free = (p for p in prefixes if not any(other.startswith(f"{p}.") for other in others))
        parts[next(free, name)] = None
    return [*parts]
