"""Values that are known in a run on the meta device: those of the model's own tensors and of constants.

The meta device hides all data. What follows from the model's parameters, buffers and constants alone is computed on the
CPU when the model's code reads it (`float(self.stride[0])`, a mask of booleans). What follows from the inputs is
unknown, but they are finite numbers: `if not torch.isfinite(x).all()` has an answer.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

from timm_autoslim.tracing.deferred import (
    DeferredCall,
    Memory,
    Value,
    copy_later,
    fill_later,
    get_later,
    make_tensor,
    outside_of_run,
    replace_values,
)
from timm_autoslim.tracing.ops.schema import tensors_in_lists
from timm_autoslim.tracing.origins import Number, strip_origin

aten = torch.ops.aten
_FINITE = {"isfinite": True, "isnan": False, "isinf": False, "isposinf": False, "isneginf": False}
_INFINITE = {aten.eq.Scalar: False, aten.ne.Scalar: True}  # comparing a finite number with infinity
_WITH_ITSELF = {aten.eq.Tensor: True, aten.ne.Tensor: False}  # comparing a finite number with itself
# Checks that choose between two ways to the same result, by module and function: answered so where data are unknown.
_CHOICES = {
    ("torch.nn.modules.transformer", "_detect_is_causal_mask"): False,
    ("transformers.masking_utils", "_ignore_causal_mask_sdpa"): False,
    ("transformers.masking_utils", "_ignore_bidirectional_mask_sdpa"): False,
}
# Functions that make a tensor like another one, of equal numbers; None if it is an argument.
LIKE = {"ones_like": 1, "zeros_like": 0, "new_ones": 1, "new_zeros": 0, "full_like": None, "new_full": None}
_NEW = frozenset({"tensor", "as_tensor", "asarray", "new_tensor"})  # functions that make a tensor of numbers
_TO_PYTHON = frozenset({"tolist", "numpy", "__array__"})
_MOVES = frozenset({"to", "type_as"})  # functions that may move a tensor to another device
_INDEXES = frozenset({aten.index.Tensor, aten._unsafe_index.Tensor})
_LENGTHS = frozenset({aten._pack_padded_sequence.default, aten._pad_packed_sequence.default})  # take them on the CPU
_FILL_ON_CPU = frozenset({"_pad_packed_sequence"})  # functions that fill a tensor on the CPU by its address
_MASKS = (torch.bool, torch.uint8)
_LARGE = 1 << 22  # larger tensors that are written in place are not followed
_UNKNOWN = object()

RunOperator = Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], Any]


class KnownValues:
    """The values of the tensors of one run, or of several runs of one model.

    All tensors of a run are on the meta device, those that the model's code makes on the CPU too.

    Attributes:
        errors: what was raised because the model's code read unknown data.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[Tensor, Tensor]] = (),
        note_read: Callable[[Sequence[Tensor], Sequence[Number]], None] | None = None,
        check_tensor: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            tensors: the tensors of the model that runs, on the meta device, each with the one that has the data.
            note_read: it gets the model's tensors that decide what the model's code reads, and such numbers.
            check_tensor: it gets every tensor with data that the model's code brings with it.
        """
        self.errors: list[Exception] = []
        self._note_read, self._check_tensor = note_read, check_tensor
        self._values: dict[int, tuple[Any, Value]] = {}  # by id of a tensor, which lives as long as the run needs it
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}  # by id of a tensor on the CPU, what stands for it
        self._keeps_devices = False  # inside a function that needs its tensors on the CPU
        self._numbers: dict[int, tuple[Tensor, Sequence[Number]]] = {}  # by id of a tensor of unknown value
        self._draws = 0  # random tensors so far; each has its own seed, whatever sizes the others have
        for tensor, data in tensors:
            if not data.is_meta and tensor.shape == data.shape:
                self._set(tensor, Value(copy_later(data, tensor.dtype), root=tensor))

    def read(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor with its data on the CPU, and note that the model's code reads it; None if unknown."""
        value = self._get(tensor)
        with outside_of_run():
            result = value.evaluate() if value is not None else None
        if value is not None and result is not None and self._note_read is not None:
            self._note_read(value.list_roots(), value.list_numbers())
        return result

    def read_constant(self, tensor: Tensor) -> float | None:
        """Return the value of a tensor of one element if it follows from constants alone; nobody is told that."""
        value = self._get(tensor)
        if value is None or value.list_roots():
            return None
        with outside_of_run():
            result = value.evaluate()
        return None if result is None else float(result)

    def list_roots(self, tensor: Tensor) -> list[Tensor]:
        """Return the model's tensors that a tensor is computed from; none if it follows from inputs or constants."""
        value = self._get(tensor)
        return [] if value is None else value.list_roots()

    def list_numbers(self, tensor: Tensor) -> list[Number]:
        """Return the numbers with an origin that a tensor is computed from, if its value is known."""
        value = self._get(tensor)
        return [] if value is None else value.list_numbers()

    def is_known(self, tensor: Tensor) -> bool:
        """Whether the value of a tensor is known."""
        return self._get(tensor) is not None

    def note_numbers(self, tensors: Sequence[Tensor], numbers: Sequence[Number]) -> None:
        """Note that numbers with an origin decide tensors."""
        for tensor in tensors:
            value = self._get(tensor)
            if value is not None:
                value.numbers += numbers
            else:
                self._numbers[id(tensor)] = tensor, numbers  # its value may be known soon

    # -- functions --------------------------------------------------------------------------------------------------

    def run_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """Run a torch function of the model's code by `run`, or answer from what is known."""
        name = getattr(func, "__name__", "")
        if name in _TO_PYTHON and args[0].is_meta:
            return self._give_to_python(func, args, kwargs)
        if name == "cpu" and args[0].is_meta:
            return args[0]
        if name in _MOVES and args[0].is_meta:
            args, kwargs = replace_values((args, kwargs), self._move, (Tensor, torch.device, str))
        self._keeps_devices = name in _FILL_ON_CPU
        self._numbers.clear()
        try:
            out = run(func, args, kwargs)
        finally:
            self._keeps_devices = False
        if name in _FINITE and isinstance(out, Tensor) and self._get(out) is None:
            self._set(out, Value(fill_later(out.shape, _FINITE[name])))
        elif name in LIKE and isinstance(out, Tensor) and self._get(out) is None:
            fill = LIKE[name] if LIKE[name] is not None else kwargs.get("fill_value", args[-1])
            if isinstance(fill, (int, float)):
                self._set(out, Value(fill_later(out.shape, strip_origin(fill))))  # for the shape is known
        elif name in _NEW and out.is_meta and self._get(out) is None:
            data = args[1 if name == "new_tensor" else 0] if len(args) > (name == "new_tensor") else None
            if isinstance(data, (int, float, tuple, list)) and not tensors_in_lists(data):
                self._set(out, Value(lambda: make_tensor(data, out.dtype)))
        return out

    def _give_to_python(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data = self.read(args[0])
        try:
            with _disable_current_modes():
                return func(args[0] if data is None else data, *args[1:], **kwargs)
        except Exception as error:
            if data is None:
                self.errors.append(error)
            raise

    def _move(self, value: Any) -> Any:
        """Return what stands for a tensor, or a device, on the meta device; a text that names no device stays."""
        if isinstance(value, Tensor):
            return value if value.is_meta else self._stand_in(value)
        if isinstance(value, str) and value.partition(":")[0] not in ("cpu", "cuda"):
            return value
        return torch.device("meta")

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the meta device that stands for one with data."""
        if id(tensor) not in self._moved:
            if self._check_tensor is not None:
                self._check_tensor(tensor)
            with outside_of_run():
                moved = torch.empty_like(tensor, device="meta", requires_grad=False)
            self._moved[id(tensor)] = tensor, moved
            self._set(moved, Value(copy_later(tensor, tensor.dtype)))
        return self._moved[id(tensor)][1]

    # -- operators --------------------------------------------------------------------------------------------------

    def run_operator(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], run: RunOperator) -> Any:
        """Run an operator by `run` on the meta device, or answer from what is known."""
        if kwargs and not self._keeps_devices:
            kwargs = self._change_options(func, kwargs)
        tensors = tensors_in_lists((*args, *kwargs.values()))
        if not all(t.is_meta for t in tensors):
            args, kwargs = replace_values((args, kwargs), self._move, Tensor)
            tensors = tensors_in_lists((*args, *kwargs.values()))
        reads = _reads_data(func)
        if func in _LENGTHS and (lengths := self.read(args[1])) is not None:
            args = args[0], lengths, *args[2:]
        elif func in _INDEXES:
            args = args[0], [index for indices in args[1] for index in self._find_positions(indices)]
        elif reads:
            answer = self._answer(func, args, kwargs)
            if answer is not _UNKNOWN:
                return answer
        try:
            out = run(func, args, kwargs)
        except Exception as error:
            if reads:
                self.errors.append(error)
            raise
        self._follow(func, args, kwargs, out, tensors)
        return out

    @staticmethod
    def _change_options(func: OpOverload, options: dict[str, Any]) -> dict[str, Any]:
        """Return options that make the results on the meta device; only data that are known are copied from there."""
        device = options.get("device")
        if device is not None and device.type != "meta" and func is not aten._to_copy.default:
            options = {**options, "device": torch.device("meta")}
        if options.get("generator") is not None:
            options = {**options, "generator": None}
        return options

    def _answer(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operator that reads data."""
        tensors = tensors_in_lists((*args, *kwargs.values()))
        if not tensors or any(self._get(t) is None for t in tensors):
            return _find_choice()
        with outside_of_run():
            out = self._make_call(func, args, kwargs).run()
        if out is None:
            return _UNKNOWN
        for tensor in tensors:
            self.read(tensor)
        return replace_values(out, self._stand_in, Tensor)

    def _find_positions(self, index: Any) -> list[Any]:
        """Return the indices (one for each dimension) that a mask of booleans stands for, if it is known."""
        if not isinstance(index, Tensor) or index.dtype not in _MASKS:
            return [index]
        mask = self.read(index)
        if mask is None:
            return [index]
        with outside_of_run():
            indices = mask.nonzero().unbind(1)
        return [self._stand_in(positions) for positions in indices]

    def _follow(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, tensors: Sequence[Tensor]
    ) -> None:
        """Note how the results follow from the arguments, or that they are unknown."""
        values = [self._get(t) for t in tensors]
        is_view, writes = _describe(func)
        known = None not in values
        if writes:
            in_place = func._schema.name.endswith("_") and isinstance(args[0], Tensor)  # else to any of several tensors
            call = self._make_call(func, args, kwargs) if known and in_place else None
            for tensor, value in zip(tensors[: 1 if in_place else None], values, strict=False):
                if value is not None:
                    self._write(value.memory, tensor, call)
        elif known:
            call = self._make_call(func, args, kwargs)
            memory = call.inputs[0].memory if is_view else None
            for value in () if is_view else call.inputs:
                value.memory.calls.append(call)
            for index, result in enumerate(tensors_in_lists(out)):
                self._set(result, Value(get_later(call, index), memory, call.inputs))
        elif func in _WITH_ITSELF and args[0] is args[1]:
            self._set(out, Value(fill_later(out.shape, _WITH_ITSELF[func])))
        elif func in _INFINITE and args[1] in (float("inf"), float("-inf")):
            self._set(out, Value(fill_later(out.shape, _INFINITE[func])))

    def _make_call(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DeferredCall:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._draws += 1
        args, kwargs = replace_values((args, kwargs), self._get, Tensor)
        return DeferredCall(func, args, kwargs, self._draws)

    @staticmethod
    def _write(memory: Memory, target: Tensor, call: DeferredCall | None) -> None:
        """Write into a tensor whose value is known, and into all that it is a view of; None writes what is unknown."""
        if target.numel() > _LARGE:
            memory.unknown = True
            return
        calls, memory.calls = memory.calls, []
        with outside_of_run():
            for reader in calls:
                reader.get_result(0)
            if call is None or call.run() is None:
                memory.unknown = True

    def _set(self, tensor: Tensor, value: Value) -> None:
        key = id(tensor)
        value.numbers += self._numbers.pop(key, (tensor, ()))[1]
        self._values[key] = weakref.ref(tensor, lambda _: self._values.pop(key, None)), value

    def _get(self, tensor: Tensor) -> Value | None:
        entry = self._values.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None


@cache
def _reads_data(func: OpOverload) -> bool:
    """Whether an operator returns data to Python, or a tensor whose shape depends on data."""
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


@cache
def _describe(func: OpOverload) -> tuple[bool, bool]:
    """Return whether an operator returns a view, and whether it writes into a tensor that it gets."""
    infos = [a.alias_info for a in (*func._schema.arguments, *func._schema.returns) if a.alias_info is not None]
    writes = any(info.is_write for info in infos)
    return bool(infos) and not writes, writes


def _find_choice() -> Any:
    """Return the answer of a check that chooses between two ways to the same result, if one runs."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        function = frame.f_globals.get("__name__"), frame.f_code.co_name
        if function in _CHOICES:
            return _CHOICES[function]
        frame = frame.f_back
    return _UNKNOWN
