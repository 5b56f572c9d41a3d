"""The recorder of a trace: it carries labels through a run, and keeps which labels every operator and module had."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.errors import TraceError
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.calls import FunctionCall
from timm_autoslim.tracing.dependence import Dependence
from timm_autoslim.tracing.describe import Describer
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.ops import recurrent
from timm_autoslim.tracing.origins import Number, strip_origin
from timm_autoslim.tracing.passing import Calls, freeze_calls
from timm_autoslim.tracing.record import Recorder
from timm_autoslim.tracing.scales import Factor, ScaleTracker, Scores
from timm_autoslim.tracing.sites import Site, find_model_site, format_site
from timm_autoslim.tracing.sizes import make_multiple
from timm_autoslim.tracing.values import LIKE
from timm_autoslim.tracing.watching import Check, watching_sizes
from timm_autoslim.utils.tensors import collect_tensors, named_tensors


@dataclass(frozen=True)
class OperatorLabels:
    """One operator of a run, with every label that it read or set."""

    name: str
    path: str
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Exit:
    """What one module returned in a run: the shape and the labels of every tensor."""

    path: str
    shapes: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[Label, ...], ...]


@dataclass(frozen=True)
class RunRecord:
    """One run of the widest: its mode, and in order its operators, what its modules returned, its attention scores.

    `calls` are what its code has passed to functions of torch, `gradients` whether these were enabled.
    """

    training: bool
    operators: tuple[OperatorLabels, ...]
    exits: tuple[Exit, ...]
    scores: tuple[Scores, ...] = ()
    calls: Calls = field(default_factory=dict)
    gradients: bool = False


# Functions of torch that compute with the sizes of their arguments in Python.
_COMPOSITES = ("multi_head_attention_forward",)


@cache
def _copy_without_guard(function: Any) -> Any:
    """Return a copy of a Python function of torch that runs its body in place of calling the mode again."""
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _collect_numbers(values: Any) -> Iterator[Number]:
    if isinstance(values, Number):
        yield values
    elif type(values) in (list, tuple, torch.Size):
        for value in values:
            yield from _collect_numbers(value)


class LabelRecorder(Recorder):
    """Carries labels through a run: it applies the rules of the operators, and gives sizes their dimension as origin.

    Attributes:
        last_path, last_shapes: the module that was entered last, and the shapes of its input tensors.
        input_shapes: by module with a `pretrained_cfg`, the shape of the first tensor that it got last.
        used_ids: ids of the tensors that an operator or function read.
        dependence: what was computed from what.
        scales: it follows the numbers that multiply attention scores.
    """

    def __init__(
        self,
        model: nn.Module,
        flow: Flow,
        foreign: Mapping[int, str],
        describer: Describer,
        numbers: Mapping[str, Factor] | None = None,
        data: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Prepare a model.

        Args:
            model: a meta copy whose integer attributes have origins (`wrap_attributes`).
            flow: the state of the trace.
            foreign: by id, the names of the tensors of the user's model, which no operator may read.
            describer: it gets every module that starts and returns.
            numbers: the tensors of the model that stand for one number.
            data: by name, the tensors with data.
        """
        super().__init__(model, flow.stack, data)
        self.flow, self.foreign, self.describer = flow, foreign, describer
        self.last_path, self.last_shapes = "", list[tuple[int, ...]]()
        self.input_shapes: dict[str, tuple[int, ...]] = {}
        self.used_ids: set[int] = set()
        self.dependence = Dependence()
        tensors = named_tensors(model)
        self.scales = ScaleTracker({id(tensors[name]): factor for name, factor in (numbers or {}).items()})
        self.scales.read_constant = self.values.read_constant
        self._operators: list[OperatorLabels] = []
        self._exits: list[Exit] = []

    def start(self) -> None:
        """Drop the record of the last run, and start another."""
        self._operators.clear()
        self._exits.clear()
        self.calls.clear()
        self.dependence.start()
        self.flow.forget_ordinary()
        self.scales.start()
        self.describer.start()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside the block, and what the model's code does with sizes."""
        with super().recording(), watching_sizes(self.flow):
            yield

    def get_record(self) -> RunRecord:
        """Return the record since `start`."""
        operators, exits, scores = tuple(self._operators), tuple(self._exits), tuple(self._list_scores())
        calls = freeze_calls(self.calls)
        return RunRecord(self.model.training, operators, exits, scores, calls, self.gradients)

    def note_call(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the model's code passes, with the origins of ordinary integers that it made of sizes."""
        super().note_call(site, *self.flow.restore_origins((args, kwargs)))

    def note_read(self, tensors: Sequence[Tensor], numbers: Sequence[Number]) -> None:
        """Freeze the channels of tensors that decide what the model's code reads: a width must not decide it."""
        for number in numbers:
            reason = f"{self.flow.path or 'the model'}: its code reads numbers that are computed from their number"
            self.flow.note_check(Check(strip_origin, (number,), reason, ""))
        for tensor in tensors:
            self.used_ids.add(id(tensor))
            self.dependence.note_read(tensor)
            reason = f"its code reads numbers that are computed from {self.names[id(tensor)]}"
            self.flow.freeze_labels(self.flow.get_labels(tensor), reason)

    def freeze_kept(self, path: str, name: str, value: Any) -> None:
        """Freeze the channels that decide a tensor or number which a module keeps from one call to the next."""
        reason = f"{path or 'the model'}: its forward keeps {name}"
        numbers = [value] if isinstance(value, Number) else []
        if isinstance(value, Tensor):
            numbers = self.values.list_numbers(value)
            for root in self.values.list_roots(value):
                for label in self.flow.get_labels(root):
                    self.flow.constraints.freeze(label, f"{reason}, which it computes from {self.names[id(root)]}")
            for label in self.flow.get_labels(value) if self.values.is_known(value) else ():
                self.flow.constraints.freeze(label, reason)
        for number in numbers:
            self.flow.note_check(Check(strip_origin, (number,), f"{reason}, which it computes from their number", ""))

    def check_tensor(self, tensor: Tensor) -> None:
        """Make sure that no weight of the user's model takes part in the run of a copy.

        Raises:
            TraceError: it is one.
        """
        if id(tensor) in self.foreign:
            site = find_model_site(self.flow.path, sys._getframe(1))
            raise TraceError.at(
                self.flow.path or "the model",
                got=f"code that, in a copy of the model, still reads {self.foreign[id(tensor)]} of the model itself"
                f"{f' (at {format_site(site)})' if site else ''}",
                needed="a forward, and hooks, that find weights through self: by an attribute, a bound method or a "
                "closure over self; not by a global name, or an object that is not copied with the model",
            )

    def has_read_data(self, error: BaseException | None) -> bool:
        """Whether an exception was raised because the model's code asked for data that nobody knows."""
        return any(error is other for other in self.values.errors)

    def list_returned(self) -> list[str]:
        """Return the paths of the modules that returned in this run."""
        return [e.path for e in self._exits]

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hand the module to the describer, and keep its path and shapes for error messages."""
        tensors = collect_tensors([args, kwargs])
        self.last_path, self.last_shapes = path, [tuple(t.shape) for t in tensors]
        if tensors:
            if hasattr(module, "pretrained_cfg"):
                self.input_shapes[path] = tuple(tensors[0].shape)
            self.describer.enter(path, module, self.flow.get_labels(tensors[0]))

    def leave(self, path: str, module: nn.Module, out: Any) -> None:
        """Record what the module returns."""
        tensors = collect_tensors(out)
        labels = tuple(tuple(self.flow.get_labels(t)) for t in tensors)
        self._exits.append(Exit(path, tuple(tuple(t.shape) for t in tensors), labels))
        self.describer.leave(path, module, labels)

    def run_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function; `flow.call` is its call while it runs."""
        name = getattr(func, "__name__", str(func))
        if name == "size" or (name == "__get__" and func == Tensor.shape.__get__):  # type: ignore[attr-defined]
            return self._add_origins(func(*args, **kwargs), args[0], *args[1:], *kwargs.values())
        if name in ("numel", "nelement") or (name == "__get__" and func == Tensor.nbytes.__get__):  # type: ignore[attr-defined]
            return make_multiple(func(*args, **kwargs), self.flow.get_sizes(args[0]))
        if name == "stride":
            return self._add_strides(func(*args, **kwargs), args[0], *args[1:], *kwargs.values())
        args, kwargs = self.flow.restore_origins((args, kwargs))
        before, self.flow.call = self.flow.call, FunctionCall(name, tuple(args), kwargs)
        self.scales.note_call(self.flow.call)
        try:
            if name in _COMPOSITES:
                return self._run_body(func, args, kwargs)
            if name in ("layer_norm", "rms_norm"):  # no operator gets the shape as the code passed it
                shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
                for label, size in zip(self.flow.get_labels(args[0])[-len(shape) :], shape, strict=True):
                    self.flow.constrain(label, size)
            if name in recurrent.LAYERS:
                tensors = ops.tensors_in_lists([*args, *kwargs.values()])
                self.used_ids.update(map(id, tensors))
                outputs = recurrent.run(self.flow, name, args, kwargs)
                self.dependence.note(tensors, ops.tensors_in_lists(outputs))
                return outputs
            out = func(*args, **kwargs)
            self._note_numbers(name, args, kwargs, out)
            return out
        finally:
            self.flow.call = before

    def _run_body(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch as the functions of torch that it calls."""
        self._is_inside = True
        try:
            with self._function_mode:
                return _copy_without_guard(func)(*args, **kwargs)
        finally:
            self._is_inside = False

    def _note_numbers(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note the numbers that decide what a function returns, and for one of a tensor's shape the sizes of that."""
        numbers = list(_collect_numbers([*args, *kwargs.values()]))
        if name in LIKE and isinstance(args[0], Tensor) and not name.startswith("new_"):
            numbers += [size for size in self.flow.get_sizes(args[0]) if isinstance(size, Number)]
        if numbers:
            self.values.note_numbers(ops.tensors_in_lists([out]), numbers)

    def _add_strides(self, strides: Any, tensor: Tensor, *dim: int) -> Any:
        """Return the strides of a tensor, or one of them, with the sizes that they are products of as origins."""
        if dim:
            return self._add_strides(tensor.stride(), tensor)[dim[0]]
        sizes = self.flow.get_sizes(tensor)
        inner = [[size for size, other in zip(sizes, strides, strict=True) if other < stride] for stride in strides]
        dense = all(prod(inner[i]) == n for i, n in enumerate(strides) if tensor.shape[i] > 1)
        return tuple(make_multiple(n, inner[i]) if dense else n for i, n in enumerate(strides))

    def _add_origins(self, shape: Any, tensor: Tensor, *dim: int) -> Any:
        """Return the shape of a tensor, or one length of it, with the dimensions as origins."""
        sizes = self.flow.get_sizes(tensor)
        return sizes[dim[0]] if isinstance(shape, int) else torch.Size(sizes)

    def run_operator(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator and its rule, and record which labels it read and set."""
        op = ops.bind(func, args, kwargs, None)
        for tensor in op.tensors:
            self.check_tensor(tensor)
        out = super().run_operator(func, args, kwargs)
        op = replace(op, out=out)
        self.used_ids.update(map(id, op.tensors))
        self.dependence.note_operator(func, op)
        inputs = [label for t in op.tensors for label in self.flow.get_labels(t)]
        ops.run(self.flow, op)
        scores = self.scales.follow(op, self.flow.path, self.flow.call)
        if scores is not None and self.flow.call.name != "linear":
            self._label_scores(scores, *op.tensors[-2:])
        outputs = [label for t in ops.tensors_in_lists(out) for label in self.flow.get_labels(t)]
        labels = {id(v): v for v in [*inputs, *outputs] if v is not None}
        self._operators.append(OperatorLabels(str(func), self.flow.path, tuple(labels.values())))
        return out

    def _label_scores(self, scores: Scores, a: Tensor, b: Tensor) -> None:
        """Note the channels that a product sums over, and those that it relates to each other."""
        (*_, rows, scores.label), (*_, columns) = [None, *self.flow.get_labels(a)], self.flow.get_labels(b)
        scores.rows = None if columns is None else rows

    def _list_scores(self) -> Iterator[Scores]:
        """Yield the products over channels, or between channels; tokens can have labels too, but are frozen."""
        for scores in self.scales.scores:
            if scores.rows is not None and (scores.label is None or self.flow.is_frozen(scores.label)):
                scores.across, scores.label = True, scores.rows
            if scores.label is not None:
                yield scores
