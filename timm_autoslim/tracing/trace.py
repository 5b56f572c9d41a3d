"""Trace a model on the meta device into a channel graph, and prove the graph before it is promised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from timm_autoslim.errors import NothingToSlimError, TraceError, WidthError
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.describe import DESCRIBES_HEAD, Describer
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import AttributeUse, Label
from timm_autoslim.tracing.prove import Disagreement, Prover, suspects
from timm_autoslim.tracing.record import LabelRecorder, Record
from timm_autoslim.tracing.refusals import check_example, check_model, explain_failure
from timm_autoslim.tracing.sizes import wrap_attributes
from timm_autoslim.tracing.solve import observe
from timm_autoslim.utils.meta import copy_to_meta, make_meta_example, run_model
from timm_autoslim.utils.tensors import collect_tensors, find_tied_names, named_tensors

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


class Tracer:
    """One trace of one model."""

    def __init__(
        self, model: nn.Module, example: Any, keep_output: bool = True, whole_heads: Sequence[str] = ()
    ) -> None:
        self.model, self.example, self.keep_output = model, example, keep_output
        self.flow = Flow(whole_heads)
        self.copy = copy_to_meta(model)
        wrap_attributes(self.copy)
        self.tensors = named_tensors(self.copy)
        self.labels = {n: self._fresh_labels(n, t) for n, t in self.tensors.items() if t.is_floating_point()}
        self.describer = Describer(self.flow, self.copy)
        foreign = frozenset(map(id, named_tensors(model).values()))
        self.recorder = LabelRecorder(self.copy, self.flow, foreign, self.describer)
        self.records: list[Record] = []

    def _fresh_labels(self, name: str, tensor: Tensor) -> list[Label]:
        """Give every axis of a weight atoms of its own; the axes of a kernel are no channels."""
        labels = self.flow.fresh_labels(tensor)
        if tensor.dim() == 2 and labels[1] is not None:
            self.flow.flat[int(labels[1][0])] = labels[1]
        if isinstance(self.copy.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvNd):
            labels = [v if axis < 2 else None for axis, v in enumerate(labels)]
            self.flow.set_labels(tensor, labels)
        return labels

    def run(self) -> Trace:
        """Trace in both modes, solve, prove, repair."""
        self.describer.listen()
        self._record(training=True)
        self._record(training=False)
        for glob in set(self.flow.whole_heads) - self.flow.heads_found:
            raise WidthError(f"whole_heads={glob!r}: the glob matches no module that splits channels into heads")
        self._scales()
        for name, tensor in self.tensors.items():
            if id(tensor) not in self.recorder.used:
                for label in self.labels.get(name, []):
                    self.flow.constraints.freeze(label, "not used in forward")
        self._hold_unsaved(self.labels.keys() - set(self.copy.state_dict()))
        shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
        parameters = [n for n, t in self.tensors.items() if isinstance(t, nn.Parameter)]
        graph = ChannelGraph.of(
            observe(self.flow, self.labels, shapes, parameters, self.describer.uses, find_tied_names(self.copy))
        )
        met = {o.name for record in self.records for o in record.operations}
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
        return Trace(graph, unruled, tuple(repairs), positional, make_meta_example(self.example, 1))

    def _record(self, training: bool) -> None:
        """Run the model once, with labels on everything."""
        self.copy.train(training)
        self.recorder.start()
        self.flow.count_macs = not training
        example = make_meta_example(self.example, 2 if training else 1)
        for tensor in collect_tensors(example):
            labels = self.flow.fresh_labels(tensor)
            self.flow.freeze(labels[1] if len(labels) > 1 else None, "a channel of the model's input")
            self.flow.set_labels(tensor, [v if d == 1 else None for d, v in enumerate(labels)])
        recorder = self.recorder
        try:
            with recorder.recording():
                out = run_model(self.copy, example)
                self.flow.count_macs = False
                self.records.append(recorder.record())
                if not training:
                    with contextlib.suppress(Exception):  # a model that breaks timm's contract can still be traced
                        self.describer.describe_model(example)
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(explain_failure(error, self.copy, recorder.last_path, recorder.last_shapes)) from error
        self._freeze_outputs(out, training)

    def _freeze_outputs(self, out: Any, training: bool) -> None:
        tensors = collect_tensors(out)
        if not tensors and not training:
            raise TraceError(
                f"the model: its forward returned a {type(out).__name__} without a tensor in eval() mode; needed: a "
                "tensor, or a tuple, list, dict or object that holds one"
            )
        for tensor in tensors if self.keep_output else []:
            for label in self.flow.labels(tensor):
                self.flow.constraints.freeze(label, "an output of the model")

    def _hold_unsaved(self, names: Iterable[str]) -> None:
        """Keep tensors that are in no checkpoint whole where their module may compute them anew, else their order.

        A module that overrides `_apply` does so when it is cast or moved (rotary tables).
        """
        for name in names:
            module = self.copy.get_submodule(name.rpartition(".")[0])
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
            for name, value in self.copy.get_submodule(path).__dict__.items():
                for vector in vectors:
                    scale = isinstance(value, float) and "drop" not in name and value == len(vector) ** -0.5
                    size = isinstance(value, int) and name in DESCRIBES_HEAD and value == len(vector)
                    if not (scale or size) or self.flow.stays(vector):  # tokens may be as many as channels
                        continue
                    use = AttributeUse(f"{path}.{name}" if path else name, value, vector, -0.5)
                    if scale:
                        self.flow.constraints.attributes.append(use)
                    else:
                        self.describer.uses.append(replace(use, value=int(value), power=1))

    # -- proving ----------------------------------------------------------------------------------------------------

    def _prove(self, graph: ChannelGraph) -> tuple[ChannelGraph, list[str]]:
        """Run subnets beside the record; where one disagrees, freeze what enters that operator and start again.

        What half the widths can do and one unit cannot (statistics over a single value) is first tried with two.

        Returns:
            The proven graph, and what had to be frozen, each with its reason.
        """
        prover = Prover(copy_to_meta(self.model), self.example, self.records)  # a copy without labels and hooks
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
        for labels in suspects(self.records, fault):
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
