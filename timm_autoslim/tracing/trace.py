"""Trace a model on the meta device into a channel graph, and prove the graph before it is promised."""

from __future__ import annotations

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
from timm_autoslim.tracing.sizes import FromDimension, Size, wrap_attributes

# Attributes that only describe a module: they are not read in forward, but users and timm read them.
_DESCRIBES_INPUT = ("in_channels", "in_features", "in_chs", "in_dim", "num_features")
_DESCRIBES_OUTPUT = ("out_channels", "out_features", "out_chs", "out_dim", "num_features", "num_channels")
MAX_REPAIRS = 40
# Aliases that torch inserts or leaves out as it likes: labels pass, but they are no steps of the record.
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


@dataclass(frozen=True)
class Step:
    """One operator of the recorded run."""

    operator: str
    path: str
    shapes: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[Label, ...], ...]  # of every output
    entering: tuple[Label, ...]


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
        labels = self.flow.labels(tensor)
        if isinstance(plain, int):
            label = labels[dim[0]]
            return plain if label is None else Size(plain, FromDimension(label))
        return torch.Size([s if v is None else Size(s, FromDimension(v)) for s, v in zip(plain, labels, strict=True)])


class _Recorder(TorchDispatchMode):
    """Run the rule of every operator, and record what it gave."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.steps: list[Step] = []
        self.used: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = ops.execute(func, args, kwargs)
        tensors = ops._tensors([*args, *kwargs.values()])
        self.used.update(id(t) for t in tensors)
        entering = tuple(label for t in tensors for label in self.flow.labels(t) if label is not None)
        ops.run(self.flow, func, args, kwargs, out)
        if func in _ALIASES:
            return out
        outs = ops._tensors(out)
        labels = tuple(tuple(self.flow.labels(t)) for t in outs)
        self.steps.append(Step(str(func), self.flow.path, tuple(tuple(t.shape) for t in outs), labels, entering))
        return out


class Disagreement(Exception):
    """A subnet did not do what the graph says; `step` is the operator, if it is known."""

    def __init__(self, message: str, step: Step | None) -> None:
        super().__init__(message)
        self.step = step


class _Lockstep(TorchDispatchMode):
    """Run a subnet beside the record: the same operators, and every dimension as long as the graph says."""

    def __init__(self, steps: Sequence[Step], active: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        super().__init__()
        self.steps, self.active, self.at = steps, active, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ALIASES:
            return func(*args, **(kwargs or {}))
        step = self.steps[min(self.at, len(self.steps) - 1)]
        if self.at >= len(self.steps) or step.operator != str(func):
            raise Disagreement(f"runs {func} where the whole model runs {step.operator}", step)
        self.at += 1
        try:
            out = ops.execute(func, args, kwargs or {})
        except Exception as error:
            raise Disagreement(f"{func} fails: {error}", step) from error
        for tensor, labels, shape in zip(ops._tensors(out), step.labels, step.shapes, strict=True):
            want = tuple(n if v is None else int(self.active[v].sum()) for n, v in zip(shape, labels, strict=True))
            if tuple(tensor.shape) != want:
                raise Disagreement(f"{func} gives the shape {tuple(tensor.shape)} where {want} was due", step)
        return out


# -- tracing --------------------------------------------------------------------------------------------------------


class _Watch:
    """Follow which module runs, and note the attributes that describe modules without being read in forward."""

    def __init__(self, flow: Flow, twin: nn.Module) -> None:
        self.flow, self.twin = flow, twin
        self.entered = ""  # the module that ran last, for error texts
        self.described: list[AttributeUse] = []
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
            for tensor in ops._tensors(out)[:1]:
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
        self.runs: list[tuple[bool, list[Step]]] = []
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
        operators = frozenset(step.operator for _, steps in self.runs for step in steps)
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
        example = _sized(self.example, 2 if training else 1)
        for tensor in ops._tensors(list(example.values()) if isinstance(example, dict) else example):
            labels = self.flow.fresh_labels(tensor)
            self.flow.freeze(labels[1] if len(labels) > 1 else None, "a channel of the model's input")
            self.flow.set_labels(tensor, [v if d == 1 else None for d, v in enumerate(labels)])
        try:
            with torch.no_grad(), _Sizes(self.flow), recorder:
                out = _call(self.twin, example)
                macs, self.flow.count_macs = self.flow.count_macs, False
                steps = len(recorder.steps)
                if not training:
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
        self.runs.append((training, recorder.steps[:steps]))
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
            step = fault.step
            if step is None:
                raise TraceError(f"a subnet of the model cannot run: {fault}")
            reason = f"{step.path or 'the model'}: as a subnet it {fault}"
            trace.repairs.append(reason)
            labels = [*step.entering, *(label for out in step.labels for label in out)]
            before = len(trace.graph.strands), sum(trace.graph.group_sizes)
            trace.graph.freeze(labels, reason)
            if before == (len(trace.graph.strands), sum(trace.graph.group_sizes)):  # nothing there was free: widen
                at = [i for _, steps in self.runs for i, s in enumerate(steps) if s is step][0]
                run = next(steps for _, steps in self.runs if any(s is step for s in steps))
                near = [v for s in run[max(0, at - 8) : at + 1] for v in s.entering]
                trace.graph.freeze(near, reason)
        raise TraceError(f"the model cannot be proven sliceable after {MAX_REPAIRS} repairs; the last: {trace.repairs[-1]}")

    def _faults(self, graph: ChannelGraph) -> Iterator[Disagreement]:
        rng = np.random.default_rng(0)
        sizes = graph.group_sizes
        trials = [[max(1, n // 2) for n in sizes], [1] * len(sizes)]
        trials += [[int(rng.integers(1, n + 1)) for n in sizes] for _ in range(2)]
        for widths in trials:
            for training, steps in self.runs:
                try:
                    self._try(graph, widths, training, steps)
                except Disagreement as fault:
                    yield fault

    def _try(self, graph: ChannelGraph, widths: Sequence[int], training: bool, steps: Sequence[Step]) -> None:
        lockstep = _Lockstep(steps, graph.active(widths))
        self.plain.train(training)
        example = _sized(self.example, 2 if training else 1)
        try:
            with torch.no_grad(), slicing.applied(self.plain, slices_of(graph, widths)), lockstep:
                _call(self.plain, example)
        except Disagreement:
            raise
        except Exception as error:
            step = steps[min(lockstep.at, len(steps) - 1)]
            raise Disagreement(f"raises {type(error).__name__}: {error}", step) from error


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
