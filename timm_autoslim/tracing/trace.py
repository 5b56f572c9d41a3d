"""Trace a model on the meta device into a channel graph, and prove the graph before it is promised."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_autoslim import slicing
from timm_autoslim.errors import NothingToSlimError, TraceError
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.flow import Call, Flow
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import AttributeUse, Label
from timm_autoslim.tracing.sizes import wrap_attributes

# Attributes that only describe a module: they are not read in forward, but users and timm read them.
_DESCRIBES_INPUT = ("in_channels", "in_features", "in_chs", "in_dim", "num_features")
_DESCRIBES_OUTPUT = ("out_channels", "out_features", "out_chs", "out_dim", "num_features", "num_channels")
MAX_REPAIRS = 40

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


@dataclass
class Trace:
    """A solved graph, with the attributes that describe the model without being read in its forward."""

    graph: ChannelGraph
    described: list[AttributeUse]
    operators: frozenset[str]
    repairs: list[str] = field(default_factory=list)


# -- the twin -------------------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter, buffer and plain tensor attribute by name; a tied tensor appears once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            for leaf, value in store.items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    found[f"{path}.{leaf}" if path else leaf] = value
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return, for every further name of a tied tensor, the name it has in `named_tensors`."""
    first = {id(t): name for name, t in named_tensors(model).items()}
    ties = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers, module.__dict__):
            for leaf, value in store.items():
                name = f"{path}.{leaf}" if path else leaf
                if isinstance(value, Tensor) and first.get(id(value), name) != name:
                    ties[name] = first[id(value)]
    return ties


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without data: every tensor is on the meta device. `model` is not touched."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(f"{path or 'the model'}: got a scripted module; convert the model before scripting it")
        if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in module._parameters.values()):
            raise TraceError(f"{path or 'the model'}: got a lazy module; run the model once on data, then convert it")
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        hollow: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
    return copy.deepcopy(model, memo)


# -- the two modes --------------------------------------------------------------------------------------------------


class _Sizes(TorchFunctionMode):
    """Hand out sizes that remember their dimension, and note which torch function runs with which arguments."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "size" or (name == "__get__" and func == Tensor.shape.__get__):  # type: ignore[attr-defined]
            return self._sizes(func(*args, **kwargs), args[0], *args[1:], *kwargs.values())
        before, self.flow.call = self.flow.call, Call(name, tuple(args), kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self.flow.call = before

    def _sizes(self, plain: Any, tensor: Tensor, *dim: int) -> Any:
        sizes = self.flow.sizes(tensor)
        return sizes[dim[0]] if isinstance(plain, int) else torch.Size(sizes)


class _Recorder(TorchDispatchMode):
    """Run the rule of every operator, and record which labels it saw."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.operations: list[Operation] = []
        self.used: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = ops.execute(func, args, kwargs)
        tensors = ops._tensors([*args, *kwargs.values()])
        self.used.update(id(t) for t in tensors)
        entering = [label for t in tensors for label in self.flow.labels(t)]
        ops.run(self.flow, func, args, kwargs, out)
        leaving = [label for t in ops._tensors(out) for label in self.flow.labels(t)]
        seen = {id(v): v for v in [*entering, *leaving] if v is not None}
        self.operations.append(Operation(str(func), self.flow.path, tuple(seen.values())))
        return out


class Disagreement(Exception):
    """A subnet did not do what the graph says: the module, and the operator if one failed."""

    def __init__(self, message: str, path: str, operator: str | None = None, labels: Sequence[Label] = ()) -> None:
        super().__init__(message)
        self.path, self.operator, self.labels = path, operator, labels


class _Lockstep(TorchDispatchMode):
    """Run a subnet beside the record: the same modules, and every output as long as the graph says.

    Modules are compared and not operators, because torch inserts and leaves out operators as strides allow.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.scope: list[str] = []
        self.exits: tuple[Exit, ...] = ()
        self.active: np.ndarray[Any, np.dtype[np.bool_]] = np.zeros(0, bool)
        self.at = 0
        for path, module in plain.named_modules():
            module.register_forward_pre_hook(self._enter(path))
            module.register_forward_hook(self._leave(path))

    def start(self, record: Record, active: np.ndarray[Any, np.dtype[np.bool_]]) -> _Lockstep:
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
            for tensor, labels, shape in zip(ops._tensors(out), due.labels, due.shapes, strict=True):
                want = tuple(n if v is None else int(self.active[v].sum()) for n, v in zip(shape, labels, strict=True))
                if tuple(tensor.shape) != want:
                    raise Disagreement(f"gives the shape {tuple(tensor.shape)} where {want} was due", path, None, labels)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return ops.execute(func, args, kwargs or {})
        except Exception as error:
            raise Disagreement(f"{func} fails: {error}", self.scope[-1], str(func)) from error


# -- tracing --------------------------------------------------------------------------------------------------------


class _Watch:
    """Follow which module runs, and note the attributes that describe modules without being read in forward."""

    def __init__(self, flow: Flow, twin: nn.Module) -> None:
        self.flow, self.twin = flow, twin
        self.entered = ""  # the module that ran last, for error texts
        self.described: list[AttributeUse] = []
        self.exits: list[Exit] = []
        self.outputs: dict[str, tuple[Tensor, list[Label]]] = {}
        self.inputs: dict[str, tuple[Tensor, list[Label]]] = {}
        for path, module in twin.named_modules():
            module.register_forward_pre_hook(self._enter(path))
            module.register_forward_hook(self._leave(path), always_call=True)

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.flow.scope.append(path)
            self.entered = path
            for tensor in ops._tensors(args)[:1]:
                self.inputs[path] = (tensor, self.flow.labels(tensor))
                self._note(path, module, _DESCRIBES_INPUT, self.flow.labels(tensor))

        return hook

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.flow.scope.pop()
            found = ops._tensors(out)
            labels = tuple(tuple(self.flow.labels(t)) for t in found)
            self.exits.append(Exit(path, tuple(tuple(t.shape) for t in found), labels))
            for tensor in found[:1]:
                self.outputs[path] = (tensor, self.flow.labels(tensor))
                self._note(path, module, _DESCRIBES_OUTPUT, self.flow.labels(tensor))

        return hook

    def _note(self, path: str, module: nn.Module, names: Sequence[str], labels: Sequence[Label]) -> None:
        if not path:  # what describes the whole model is read from its own methods, below
            return
        for name in names:
            value = module.__dict__.get(name)
            if isinstance(value, int):
                self.note(f"{path}.{name}", int(value), labels)

    def note(self, path: str, value: int, labels: Sequence[Label]) -> None:
        """Note that this attribute is the length of one of these dimensions."""
        match = [v for v in labels if v is not None and len(v) == value]
        if match:
            self.described.append(AttributeUse(path, value, match[0]))

    def describe_model(self) -> None:
        """Note what timm promises about a model: num_features, head_hidden_size, and the channels in feature_info."""
        for i, info in enumerate(getattr(self.twin, "feature_info", None) or []):
            if not isinstance(info, dict) or "num_chs" not in info:
                continue
            seen = self.inputs if info.get("hook_type") == "forward_pre" else self.outputs
            tensor_labels = seen.get(info.get("module", ""))
            if tensor_labels:
                self.note(f"feature_info.{i}.num_chs", int(info["num_chs"]), tensor_labels[1])
        features = self.outputs.get("forward_features")
        value = self.twin.__dict__.get("num_features")
        if features and isinstance(value, int):
            self.note("num_features", int(value), features[1])
        hidden = self.twin.__dict__.get("head_hidden_size")
        if features and isinstance(hidden, int):
            pooled = self.twin.forward_head(features[0], pre_logits=True)
            self.note("head_hidden_size", int(hidden), self.flow.labels(pooled))

    def listen(self) -> None:
        """Note the labels that leave `forward_features`, which is a method and not a module."""
        if not callable(getattr(self.twin, "forward_features", None)):
            return
        inner = self.twin.forward_features

        def forward_features(*args: Any, **kwargs: Any) -> Any:
            out = inner(*args, **kwargs)
            for tensor in ops._tensors(out)[:1]:
                self.outputs["forward_features"] = (tensor, self.flow.labels(tensor))
            return out

        self.twin.__dict__["forward_features"] = forward_features


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def _sized(example: Any, batch: int) -> Any:
    """Return the example on the meta device, with this many images."""
    if isinstance(example, Tensor):
        return torch.empty((batch, *example.shape[1:]), dtype=example.dtype, device="meta")
    if isinstance(example, dict):
        return {k: _sized(v, batch) for k, v in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(_sized(v, batch) for v in example)
    return example


class Tracer:
    """One trace of one model."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.example = example
        self.flow = Flow()
        self.twin = meta_twin(model)
        self.plain = meta_twin(model)  # proving must not meet the wrapped integers or the hooks
        wrap_attributes(self.twin)
        self.tensors = named_tensors(self.twin)
        self.labels = {n: self.flow.fresh_labels(t) for n, t in self.tensors.items() if t.is_floating_point()}
        self.watch = _Watch(self.flow, self.twin)
        self.runs: list[Record] = []
        self.lockstep = _Lockstep(self.plain)
        self.used: set[int] = set()

    def run(self) -> Trace:
        """Trace in both modes, solve, prove, repair."""
        self.watch.listen()
        self._record(training=True)
        self._record(training=False)
        for name, tensor in self.tensors.items():
            if id(tensor) not in self.used:
                for label in self.labels.get(name, []):
                    self.flow.constraints.freeze(label, "not used in forward")
        shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
        parameters = [n for n, t in self.tensors.items() if isinstance(t, nn.Parameter)]
        graph = ChannelGraph(self.flow, self.labels, shapes, parameters)
        operators = frozenset(o.name for run in self.runs for o in run.operations)
        trace = Trace(graph, self.watch.described, operators)
        self._prove(trace)
        if not graph.group_sizes:
            reasons = sorted(set(graph.fixed.values()))[:8]
            raise NothingToSlimError("no channel of the model can be removed; what is in the way: " + "; ".join(reasons))
        return trace

    def _record(self, training: bool) -> None:
        self.twin.train(training)
        self.flow.count_macs = not training
        recorder = _Recorder(self.flow)
        self.watch.exits.clear()
        example = _sized(self.example, 2 if training else 1)
        for tensor in ops._tensors(list(example.values()) if isinstance(example, dict) else example):
            labels = self.flow.fresh_labels(tensor)
            self.flow.freeze(labels[1] if len(labels) > 1 else None, "a channel of the model's input")
            self.flow.set_labels(tensor, [v if d == 1 else None for d, v in enumerate(labels)])
        try:
            with torch.no_grad(), _Sizes(self.flow), recorder:
                out = _call(self.twin, example)
                macs, self.flow.count_macs = self.flow.count_macs, False
                record = Record(training, tuple(recorder.operations), tuple(self.watch.exits))
                if not training:
                    with contextlib.suppress(Exception):  # not every model keeps timm's contract; it is not the trace's business
                        self.watch.describe_model()
                self.flow.count_macs = macs
        except Exception as error:
            mode = "train" if training else "eval"
            raise TraceError(
                f"{self.watch.entered or 'the model'}: its forward raised {type(error).__name__} in {mode}() mode on the meta device "
                f"({error}); needed: a forward that runs on example_input without reading data values"
            ) from error
        for tensor in ops._tensors(list(out.values()) if isinstance(out, dict) else out):
            for label in self.flow.labels(tensor):
                self.flow.constraints.freeze(label, "an output of the model")
        self.runs.append(record)
        self.used |= recorder.used

    # -- proving ----------------------------------------------------------------------------------------------------

    def _prove(self, trace: Trace) -> None:
        """Run subnets beside the record; where one disagrees, freeze what enters that operator and start again."""
        for _ in range(MAX_REPAIRS):
            if not trace.graph.group_sizes:
                return
            fault = next(self._faults(trace.graph), None)
            if fault is None:
                return
            reason = f"{fault.path or 'the model'}: as a subnet it {fault}"
            trace.repairs.append(reason)
            before = sum(trace.graph.group_sizes)
            for labels in self._suspects(fault):
                trace.graph.freeze(labels, reason)
                if sum(trace.graph.group_sizes) < before:
                    break
            else:
                raise TraceError(f"a subnet of the model cannot run, whatever stays: {reason}")
        raise TraceError(f"the model cannot be proven sliceable after {MAX_REPAIRS} repairs; the last: {trace.repairs[-1]}")

    def _suspects(self, fault: Disagreement) -> Iterator[list[Label]]:
        """Yield ever wider sets of labels that may be at fault: the operator's, the module's, its parents'."""
        seen = [o for run in self.runs for o in run.operations]
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

    def _faults(self, graph: ChannelGraph) -> Iterator[Disagreement]:
        rng = np.random.default_rng(0)
        sizes = graph.group_sizes
        trials = [[max(1, n // 2) for n in sizes], [1] * len(sizes)]
        trials += [[int(rng.integers(1, n + 1)) for n in sizes] for _ in range(2)]
        for widths in trials:
            for record in self.runs:
                try:
                    self._try(graph, widths, record)
                except Disagreement as fault:
                    yield fault

    def _try(self, graph: ChannelGraph, widths: Sequence[int], record: Record) -> None:
        self.plain.train(record.training)
        example = _sized(self.example, 2 if record.training else 1)
        lockstep = self.lockstep.start(record, graph.active(widths))
        try:
            with torch.no_grad(), slicing.applied(self.plain, slices_of(graph, widths)), lockstep:
                _call(self.plain, example)
        except Disagreement:
            raise
        except Exception as error:
            raise Disagreement(f"raises {type(error).__name__}: {error}", lockstep.scope[-1]) from error


def slices_of(graph: ChannelGraph, widths: Sequence[int], described: Mapping[str, tuple[int, int, Any]] | None = None) -> slicing.Slices:
    """Return what every tensor keeps and every attribute is at these widths, one for each group."""
    active = None
    tensors: dict[str, tuple[slicing.Axis, ...]] = {}
    for (name, axis), length in graph.lengths.items():
        place = graph.places[name, axis]
        runs: slicing.Axis
        if place.prefix is not None:
            strand = graph.strands[place.prefix]
            runs = ((0, strand.ratio * widths[strand.group]),)
            if runs[0][1] == graph.shapes[name][axis]:
                continue
        else:
            if length(widths) == graph.shapes[name][axis]:
                continue
            if active is None:
                active = graph.active(widths)
            runs = _runs(active[graph._vectors[name, axis]])
        axes = list(tensors.get(name, (None,) * len(graph.shapes[name])))
        axes[axis] = runs
        tensors[name] = tuple(axes)
    attributes: dict[str, slicing.Value] = {}
    for path, (value, whole, count) in {**graph.attributes, **(described or {})}.items():
        new = value * count(widths) // whole
        if new != value:
            attributes[path] = new
    return slicing.Slices(tensors, attributes)


def _runs(keep: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[tuple[int, int], ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    return tuple((int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def trace(model: nn.Module, example: Any) -> Trace:
    """Trace `model` on `example` (a tensor, a tuple or a dict of inputs) into a proven channel graph.

    The model is not touched: the trace runs a copy without data on the meta device.

    Raises:
        TraceError: the forward raises on the meta device, or a module cannot be traced.
        NothingToSlimError: no channel can be removed; the text names what is in the way.
    """
    return Tracer(model, example).run()
