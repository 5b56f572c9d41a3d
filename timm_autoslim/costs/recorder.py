"""Record one forward: every operator with its arguments, and from when to when its tensors live."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.tracing.ops import recurrent
from timm_autoslim.tracing.record import Recorder
from timm_autoslim.utils.tensors import collect_tensors, named_tensors

ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor among the arguments of an operator: its type, its shape, and its dimensions from slow to fast."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """One operator: its name (`aten.mm.default`), its module, its arguments with a `TensorSpec` for every tensor."""

    name: str
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Storage:
    """Memory that one operator allocates.

    Attributes:
        numbers: the bytes of one element, and the lengths of its tensor; their product is its size.
        born, last: the operator that allocates it, and the last one that it lives in.
        unless_equal: the storage is not there where these two numbers are equal.
    """

    numbers: tuple[int, ...]
    born: int
    last: int
    unless_equal: tuple[int, int] | None = None


class TapeRecorder(Recorder):
    """Notes every operator and every storage of a run; a storage ends when Python drops its last tensor.

    Fused attention and recurrent layers are one operator each, as their kernels are.

    Attributes:
        operators: what ran, in its order.
        storages: what was allocated; complete after `finish`.
    """

    def __init__(self, model: nn.Module, example: Any, data: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(model, data=data)
        self.operators: list[Operator] = []
        self.storages: list[Storage] = []
        self._fused = 0  # above 0 inside a function that counts as one operator
        # held as long as the recorder lives, so that no new storage takes the key of one of them
        self._inputs = [*named_tensors(model).values(), *collect_tensors(example)]
        self._indices = {_key(t): -1 for t in self._inputs}  # by storage; -1 was there before the run

    def finish(self) -> None:
        """Let what is still alive live to the end."""
        for storage in self.storages:
            storage.last = len(self.operators) - 1 if storage.last < 0 else storage.last

    def run_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function; note fused attention and recurrent layers as one operator."""
        name = getattr(func, "__name__", "")
        attention = name == ATTENTION and all(t.dim() == 4 for t in args[:3]) and len(args) >= 3
        if not attention and name not in recurrent.LAYERS:
            return super().run_function(func, args, kwargs)
        self._fused += 1
        try:
            out = _attend(*args[:3]) if attention else super().run_function(func, args, kwargs)
        finally:
            self._fused -= 1
        self._note(name, args, kwargs, out)
        if attention:
            self._note_scores(args[0], args[1], out)
        return out

    def run_operator(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, and note it."""
        out = super().run_operator(func, args, kwargs)
        if not self._fused:
            self._note(str(func), args, kwargs, out)
        return out

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note one operator and what it allocated."""
        at = len(self.operators)
        self.operators.append(Operator(name, self.stack.path, describe(tuple(args)), describe(kwargs)))
        for tensor in collect_tensors(out):
            key = _key(tensor)
            if key in self._indices:
                continue
            storage = tensor.untyped_storage()
            self._indices[key] = len(self.storages)
            size = tensor.element_size()
            exact = storage.nbytes() == tensor.numel() * size
            numbers = (size, *tensor.shape) if exact else (1, storage.nbytes())
            self.storages.append(Storage(numbers, at, -1))
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        index = self._indices.pop(key, -1)
        if index >= 0:
            self.storages[index].last = len(self.operators) - 1

    def _note_scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        """Note the scores, which torch makes where queries and values differ in width: no fused kernel takes these.

        In the softmax it then holds scaled queries and keys, the scores, and their softmax; the result is yet to come
        (`_scaled_dot_product_attention_math` of ATen).
        """
        at, size = len(self.operators) - 1, q.element_size()
        scores = (*q.shape[:3], k.shape[2])
        unless = (q.shape[-1], out.shape[-1])
        for numbers in ((size, *q.shape), (size, *k.shape), (2 * size, *scores), (-size, *out.shape)):
            self.storages.append(Storage(tuple(int(n) for n in numbers), at, at, unless))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the result of fused attention, heads next to channels in memory, as its kernels write it."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


# -- arguments as numbers -------------------------------------------------------------------------------------------


def describe(value: Any) -> Any:
    """Return arguments with a `TensorSpec` in place of every tensor."""
    if isinstance(value, Tensor):
        shape, strides = tuple(value.shape), value.stride()
        order = sorted(range(len(shape)), key=lambda d: (-strides[d] if shape[d] > 1 else 0, d))
        in_order = _is_in_order(shape, order)
        return TensorSpec(value.dtype, shape, tuple(range(len(shape))) if in_order else tuple(order))
    if isinstance(value, (tuple, list)):
        return tuple(describe(v) for v in value)
    if isinstance(value, dict):
        return {key: describe(v) for key, v in value.items()}
    return value


def _is_in_order(shape: tuple[int, ...], order: Sequence[int]) -> bool:
    """Whether the dimensions that are longer than 1 lie in memory in their order."""
    long = [d for d in order if shape[d] > 1]
    return long == sorted(long)


def collect_numbers(value: Any) -> Iterator[int]:
    """Yield every integer in described arguments, in their order."""
    if isinstance(value, TensorSpec):
        yield from value.shape
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from collect_numbers(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from collect_numbers(part)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield int(value)


def replace_numbers(value: Any, numbers: Iterator[int]) -> Any:
    """Return described arguments with other integers in place of theirs, in the order of `collect_numbers`."""
    if isinstance(value, TensorSpec):
        return TensorSpec(value.dtype, tuple(next(numbers) for _ in value.shape), value.order)
    if isinstance(value, (tuple, list)):
        return tuple(replace_numbers(part, numbers) for part in value)
    if isinstance(value, dict):
        return {key: replace_numbers(part, numbers) for key, part in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return next(numbers)
    return value
