"""Record one forward: every operator with its arguments, and from when to when its tensors live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_autoslim.tracing import ops
from timm_autoslim.tracing.ops import recurrent
from timm_autoslim.utils.meta import named_tensors, tensors_in

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


class Recorder(TorchDispatchMode):
    """Note every operator and every storage of a run; a storage ends when Python drops its last tensor."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.storages: list[Storage] = []
        self._scope: list[str] = [""]
        self.fused = 0  # above 0 inside a function that counts as one operator
        self._inputs = [*named_tensors(model).values(), *tensors_in(example)]  # held, so that no new storage has a key
        self._indices = {_key(t): -1 for t in self._inputs}  # by storage; -1 was there before the run
        self._hooks = [m.register_forward_pre_hook(partial(self._enter, path)) for path, m in model.named_modules()]
        self._hooks += [m.register_forward_hook(self._leave, always_call=True) for m in model.modules()]

    def _enter(self, path: str, *_: Any) -> None:
        self._scope.append(path)

    def _leave(self, *_: Any) -> None:
        self._scope.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = ops.execute(func, args, kwargs)
        if not self.fused:
            self.note(str(func), args, kwargs, out)
        return out

    def note(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Note one operator and what it allocated."""
        at = len(self.operators)
        self.operators.append(Operator(name, self._scope[-1], describe(tuple(args)), describe(kwargs)))
        for tensor in tensors_in(out):
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

    def close(self) -> None:
        """Leave the model, and let what is still alive live to the end."""
        for hook in self._hooks:
            hook.remove()
        for storage in self.storages:
            storage.last = len(self.operators) - 1 if storage.last < 0 else storage.last


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class FusedOperators(TorchFunctionMode):
    """Take fused attention and recurrent layers as one operator each, as their kernels are."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        make: Callable[[], Tensor | tuple[Tensor, ...]]
        if name == ATTENTION and all(t.dim() == 4 for t in args[:3]) and len(args) >= 3:
            make = partial(_attend, *args[:3])
        elif name in recurrent.LAYERS:
            make = partial(recurrent.outputs, args)
        else:
            return func(*args, **kwargs)
        self.recorder.fused += 1
        try:
            out = make()
        finally:
            self.recorder.fused -= 1
        self.recorder.note(name, args, kwargs, out)
        if name == ATTENTION:
            self._note_scores(args[0], args[1], tensors_in(out)[0])
        return out

    def _note_scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        """Note the scores, which torch makes where queries and values differ in width: no fused kernel takes these.

        In the softmax it then holds scaled queries and keys, the scores, and their softmax; the result is yet to come
        (`_scaled_dot_product_attention_math` of ATen).
        """
        at, size = len(self.recorder.operators) - 1, q.element_size()
        scores = (*q.shape[:3], k.shape[2])
        unless = (q.shape[-1], out.shape[-1])
        for numbers in ((size, *q.shape), (size, *k.shape), (2 * size, *scores), (-size, *out.shape)):
            self.recorder.storages.append(Storage(tuple(int(n) for n in numbers), at, at, unless))


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


def numbers_in(value: Any) -> Iterator[int]:
    """Yield every integer in described arguments, in their order."""
    if isinstance(value, TensorSpec):
        yield from value.shape
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from numbers_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from numbers_in(part)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield int(value)


def replace_numbers(value: Any, numbers: Iterator[int]) -> Any:
    """Return described arguments with other integers in place of theirs, in the order of `numbers_in`."""
    if isinstance(value, TensorSpec):
        return TensorSpec(value.dtype, tuple(next(numbers) for _ in value.shape), value.order)
    if isinstance(value, (tuple, list)):
        return tuple(replace_numbers(part, numbers) for part in value)
    if isinstance(value, dict):
        return {key: replace_numbers(part, numbers) for key, part in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return next(numbers)
    return value
