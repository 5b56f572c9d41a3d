"""Trace a model on the meta device into a channel graph, and prove the graph before it is promised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_autoslim.errors import NothingToSlimError, TraceError, WidthError
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.describe import DESCRIBES_HEAD, Watch
from timm_autoslim.tracing.flow import Call, Flow
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import AttributeUse, Label
from timm_autoslim.tracing.ops import recurrent
from timm_autoslim.tracing.prove import Disagreement, Operation, Prover, Record, suspects
from timm_autoslim.tracing.refusals import check_example, check_model, what_failed
from timm_autoslim.tracing.sizes import FromExpression, Size, wrap_attributes
from timm_autoslim.tracing.solve import observe
from timm_autoslim.utils.meta import call, meta_twin, named_tensors, seeded, sized, tensors_in, tied_names

MAX_REPAIRS = 40
NARROW = 0.35  # of the MACs at half width, where a quarter is ideal


@dataclass(frozen=True)
class Trace:
    """What a trace found out about a model.

    Attributes:
        graph: the proven channel graph.
        unruled: operators that the forward uses and that have no rule; what enters them is fixed.
        repairs: what the proof had to freeze, each with its reason.
        positional: how many inputs the example gave by position.
        example: the example on the meta device.
    """

    graph: ChannelGraph
    unruled: frozenset[str]
    repairs: tuple[str, ...]
    positional: int
    example: Any


# -- the two modes --------------------------------------------------------------------------------------------------


# Functions of torch that do arithmetic on sizes of their own.
_COMPOSITES = ("multi_head_attention_forward",)


@cache
def _unguarded(function: Any) -> Any:
    """Return a copy of a Python function of torch that does not hand itself to the mode that calls it."""
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class _Sizes(TorchFunctionMode):
    """Hand out sizes that remember their dimension, and note which torch function runs with which arguments."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.used: set[int] = set()  # tensors that no operator sees, because the function is taken whole

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "size" or (name == "__get__" and func == Tensor.shape.__get__):  # type: ignore[attr-defined]
            return self._sizes(func(*args, **kwargs), args[0], *args[1:], *kwargs.values())
        if name in ("numel", "nelement"):
            return self._number(func(*args, **kwargs), args[0])
        before, self.flow.call = self.flow.call, Call(name, tuple(args), kwargs)
        try:
            if name in _COMPOSITES:
                with self:
                    return _unguarded(func)(*args, **kwargs)
            if name in ("layer_norm", "rms_norm"):  # decomposed before an operator could see the shape asked for
                shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
                for label, size in zip(self.flow.labels(args[0])[-len(shape) :], shape, strict=True):
                    self.flow.constrain(label, size)
            if name in recurrent.LAYERS:
                self.used.update(id(t) for t in ops.tensors_in_lists([*args, *kwargs.values()]))
                return recurrent.run(self.flow, name, args, kwargs)
            return func(*args, **kwargs)
        finally:
            self.flow.call = before

    def _number(self, plain: int, tensor: Tensor) -> int:
        dims = tuple(size for size in self.flow.sizes(tensor) if isinstance(size, Size))
        return Size(plain, FromExpression(dims, len(dims) == 1, dims)) if dims else plain

    def _sizes(self, plain: Any, tensor: Tensor, *dim: int) -> Any:
        sizes = self.flow.sizes(tensor)
        return sizes[dim[0]] if isinstance(plain, int) else torch.Size(sizes)


class _Recorder(TorchDispatchMode):
    """Run the rule of every operator, and record which labels it saw."""

    def __init__(self, flow: Flow, foreign: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = flow
        self.foreign = foreign  # the tensors of the model itself
        self.operations: list[Operation] = []
        self.used: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = ops.tensors_in_lists([*args, *kwargs.values()])
        if not self.foreign.isdisjoint(map(id, tensors)):
            raise TraceError(
                f"{self.flow.path or 'the model'}: its forward runs on the weights of this very model in a copy too (a "
                "lambda or closure over the model was put in place of forward?); needed: a forward that finds its "
                "weights through self, such as types.MethodType(function, model)"
            )
        out = ops.execute(func, args, kwargs)
        self.used.update(id(t) for t in tensors)
        entering = [label for t in tensors for label in self.flow.labels(t)]
        ops.run(self.flow, func, args, kwargs, out)
        leaving = [label for t in ops.tensors_in_lists(out) for label in self.flow.labels(t)]
        seen = {id(v): v for v in [*entering, *leaving] if v is not None}
        self.operations.append(Operation(str(func), self.flow.path, tuple(seen.values())))
        return out


# -- tracing --------------------------------------------------------------------------------------------------------


class Tracer:
    """One trace of one model."""

    def __init__(
        self, model: nn.Module, example: Any, keep_output: bool = True, whole_heads: Sequence[str] = ()
    ) -> None:
        self.model, self.example, self.keep_output = model, example, keep_output
        self.flow = Flow(whole_heads)
        self.foreign = frozenset(map(id, named_tensors(model).values()))
        self.twin = meta_twin(model)
        self.plain = meta_twin(model)  # proving must not meet the wrapped integers or these hooks
        wrap_attributes(self.twin)
        self.tensors = named_tensors(self.twin)
        self.labels = {n: self._fresh_labels(n, t) for n, t in self.tensors.items() if t.is_floating_point()}
        self.watch = Watch(self.flow, self.twin)
        self.runs: list[Record] = []
        self.used: set[int] = set()

    def _fresh_labels(self, name: str, tensor: Tensor) -> list[Label]:
        """Give every axis of a weight atoms of its own; the axes of a kernel are no channels."""
        labels = self.flow.fresh_labels(tensor)
        if tensor.dim() == 2 and labels[1] is not None:
            self.flow.flat[int(labels[1][0])] = labels[1]
        if isinstance(self.twin.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvNd):
            labels = [v if axis < 2 else None for axis, v in enumerate(labels)]
            self.flow.set_labels(tensor, labels)
        return labels

    def run(self) -> Trace:
        """Trace in both modes, solve, prove, repair."""
        self.watch.listen()
        self._record(training=True)
        self._record(training=False)
        for glob in set(self.flow.whole_heads) - self.flow.heads_found:
            raise WidthError(f"whole_heads={glob!r}: the glob matches no module that splits channels into heads")
        self._scales()
        for name, tensor in self.tensors.items():
            if id(tensor) not in self.used:
                for label in self.labels.get(name, []):
                    self.flow.constraints.freeze(label, "not used in forward")
        self._hold_unsaved(self.labels.keys() - set(self.twin.state_dict()))
        shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
        parameters = [n for n, t in self.tensors.items() if isinstance(t, nn.Parameter)]
        graph = ChannelGraph.of(
            observe(self.flow, self.labels, shapes, parameters, self.watch.described, tied_names(self.twin))
        )
        met = {o.name for run in self.runs for o in run.operations}
        unruled = frozenset(name.rpartition(".")[0] for name in met if not ops.has_rule(name))
        given = self.example
        positional = len(given) if isinstance(given, tuple) else 0 if isinstance(given, Mapping) else 1
        graph, repairs = self._prove(self._hold_tables(graph))
        if not graph.group_sizes and "*" not in self.flow.whole_heads:
            with contextlib.suppress(NothingToSlimError, WidthError):
                return Tracer(self.model, self.example, self.keep_output, ["*"]).run()
        if not graph.group_sizes:
            reasons = sorted(set(graph.fixed.values()))[:8] or ["it has no weights, and so no channels"]
            raise NothingToSlimError(
                "no channel of the model can be removed; what is in the way: " + "; ".join(reasons)
            )
        return Trace(graph, unruled, tuple(repairs), positional, sized(self.example, 1))

    def _record(self, training: bool) -> None:
        self.twin.train(training)
        self.flow.count_macs = not training
        recorder, sizes = _Recorder(self.flow, self.foreign), _Sizes(self.flow)
        self.watch.exits.clear()
        example = sized(self.example, 2 if training else 1)
        for tensor in tensors_in(example):
            labels = self.flow.fresh_labels(tensor)
            self.flow.freeze(labels[1] if len(labels) > 1 else None, "a channel of the model's input")
            self.flow.set_labels(tensor, [v if d == 1 else None for d, v in enumerate(labels)])
        try:
            with torch.no_grad(), seeded(), sizes, recorder:
                out = call(self.twin, example)
                macs, self.flow.count_macs = self.flow.count_macs, False
                record = Record(training, tuple(recorder.operations), tuple(self.watch.exits))
                if not training:
                    with contextlib.suppress(
                        Exception
                    ):  # not every model keeps timm's contract; it is not the trace's business
                        self.watch.describe_model(example)
                self.flow.count_macs = macs
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(what_failed(error, self.twin, self.watch.entered, self.watch.got)) from error
        found = tensors_in(out)
        if not found and not training:
            raise TraceError(
                f"the model: its forward returned a {type(out).__name__} without a tensor in eval() mode; needed: a "
                "tensor, or a tuple, list, dict or object that holds one"
            )
        for tensor in found if self.keep_output else []:
            for label in self.flow.labels(tensor):
                self.flow.constraints.freeze(label, "an output of the model")
        self.runs.append(record)
        self.used |= recorder.used | sizes.used

    def _hold_unsaved(self, names: Iterable[str]) -> None:
        """Keep tensors that are in no checkpoint whole where their module may compute them anew, else their order.

        A module that overrides `_apply` does so when it is cast or moved (rotary tables).
        """
        for name in names:
            module = self.twin.get_submodule(name.rpartition(".")[0])
            renewed = type(module)._apply is not nn.Module._apply
            for label in self.labels[name]:
                if renewed:
                    self.flow.constraints.freeze(label, f"{name} is in no checkpoint, and its module may renew it")
                elif label is not None:
                    self.flow.constraints.ordered.append(label)

    def _hold_tables(self, graph: ChannelGraph) -> ChannelGraph:
        """Keep the columns of tables that no module makes (coordinates): like an input's channels, they are data."""
        made = {strand.group for strand in graph.strands if strand.producers}
        unmade = {index for index, strand in enumerate(graph.strands) if strand.group not in made}
        columns = [
            label
            for name in self.labels.keys() - set(graph.parameters)
            for axis, label in enumerate(self.labels[name])
            if label is not None and not unmade.isdisjoint(graph.places[name, axis].strand.tolist())
        ]
        return graph.freeze(columns, "the columns of a table that no module makes") if columns else graph

    def _scales(self) -> None:
        """Let the scale of attention scores, and the size it comes from, follow what the scores run along.

        A scale is computed when the model is built (`self.scale = head_dim ** -0.5`), and fused attention does not
        read it: it is recognised by its value.
        """
        for path, vectors in self.flow.contracted.items():
            for name, value in self.twin.get_submodule(path).__dict__.items():
                for vector in vectors:
                    scale = isinstance(value, float) and "drop" not in name and value == len(vector) ** -0.5
                    size = isinstance(value, int) and name in DESCRIBES_HEAD and value == len(vector)
                    if not (scale or size) or self.flow.stays(vector):  # tokens may be as many as channels
                        continue
                    use = AttributeUse(f"{path}.{name}" if path else name, value, vector, -0.5)
                    if scale:
                        self.flow.constraints.attributes.append(use)
                    else:
                        self.watch.described.append(replace(use, value=int(value), power=1))

    # -- proving ----------------------------------------------------------------------------------------------------

    def _prove(self, graph: ChannelGraph) -> tuple[ChannelGraph, list[str]]:
        """Run subnets beside the record; where one disagrees, freeze what enters that operator and start again.

        What half the widths can do and one unit cannot (statistics over a single value) is first tried with two.

        Returns:
            The proven graph, and what had to be frozen, each with its reason.
        """
        prover = Prover(self.plain, self.example, self.runs)
        repairs: list[str] = []
        raised = ""  # where a width of 1 failed, after which the least width became 2
        for _ in range(MAX_REPAIRS):
            fault = next(prover.faults(graph), None) if graph.group_sizes else None
            if fault is None:
                return graph, repairs
            reason = f"{fault.path or 'the model'}: as a subnet it {fault}"
            if fault.narrow and not raised:
                raised, graph = reason, replace(graph, floor=2)
                continue
            if fault.narrow and reason.partition(":")[0] == raised.partition(":")[0]:
                graph = replace(graph, floor=1)  # it was not the width of 1
            repairs.append(reason)
            graph = self._repair(graph, fault, reason)
        raise TraceError(f"the model cannot be proven sliceable after {MAX_REPAIRS} repairs; the last: {repairs[-1]}")

    def _repair(self, graph: ChannelGraph, fault: Disagreement, reason: str) -> ChannelGraph:
        """Freeze what may be at fault, ever more of it until that makes a difference."""
        for labels in suspects(self.runs, fault):
            graph, before = graph.freeze(labels, reason), graph
            if sum(graph.group_sizes) < sum(before.group_sizes):
                return graph
        raise TraceError(f"a subnet of the model cannot run, whatever stays: {reason}")


def trace(model: nn.Module, example: Any, keep_output: bool = True, whole_heads: Sequence[str] = ()) -> Trace:
    """Trace `model` on `example` (a tensor, a tuple or a dict of inputs) into a proven channel graph.

    The model is not touched: the trace runs a copy without data on the meta device. Unless `keep_output`, the channels
    of its outputs can shrink too. Modules that a glob of `whole_heads` matches lose whole heads of attention, all
    others channels of every head.

    Raises:
        TraceError: the forward raises on the meta device, or a module cannot be traced.
        NothingToSlimError: no channel can be removed; the text names what is in the way.
        WidthError: a glob of `whole_heads` matches no module that splits channels into heads.
    """
    check_model(model)
    check_example(example)
    found = Tracer(model, example, keep_output, whole_heads).run()
    others = [sorted({path.rpartition(".")[0] for path in found.graph.torn}), ["*"]]
    for other in others:  # where a split took its last axis and much stays whole, try the other one
        if other and found.graph.half() > NARROW:
            with contextlib.suppress(TraceError, WidthError):
                again = Tracer(model, example, keep_output, [*whole_heads, *other]).run()
                found = again if again.graph.half() < found.graph.half() - 0.01 else found
    return found
