"""One trace of a model on the meta device into a channel graph, which is proven before it is promised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from timm_autoslim.errors import TraceError, WidthError
from timm_autoslim.slicing.slices import clear_caches
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.buffers import constrain_unsaved, freeze_refilled, freeze_tables
from timm_autoslim.tracing.caches import (
    Holdings,
    KeptNumbers,
    drop_memories,
    empty_attributes,
    find_caches,
    find_filled,
    list_holdings,
)
from timm_autoslim.tracing.calls import wrap_attributes
from timm_autoslim.tracing.checks import keep_answers, list_size_checks
from timm_autoslim.tracing.describe import Describer
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.heads import HeadBinder
from timm_autoslim.tracing.label_recorder import LabelRecorder, RunRecord
from timm_autoslim.tracing.labels import AttributeUse, Label
from timm_autoslim.tracing.observe import observe
from timm_autoslim.tracing.other_methods import Surroundings, list_other_forwards
from timm_autoslim.tracing.outer_state import OuterState
from timm_autoslim.tracing.prove import Prover
from timm_autoslim.tracing.record import Recorder
from timm_autoslim.tracing.refusals import explain_failure
from timm_autoslim.tracing.repair import repair
from timm_autoslim.tracing.scales import find_number_tensors, wrap_floats
from timm_autoslim.tracing.solve import OUTPUT, UNUSED
from timm_autoslim.tracing.strays import check_copy, freeze_strays
from timm_autoslim.utils.globs import describe_near, matches
from timm_autoslim.utils.meta import copy_to_meta, count_images, make_meta_example, run_model, without_gradients
from timm_autoslim.utils.tensors import collect_tensors, find_tied_names, name_tensors, named_tensors


@dataclass(frozen=True)
class Trace:
    """The result of a trace.

    Attributes:
        graph: the proven channel graph.
        unruled: operators that the forward uses and that have no rule; what enters them is fixed.
        repairs: the reasons for which the proof had to freeze more.
        positional: the number of inputs that the example passes by position.
        example: the example on the meta device.
        batch: whether its first dimension is a batch of any length; else the model takes this length alone.
        written: paths of attributes that hold numbers or texts, and that the forward changes.
        constants: the numbers that multiply attention scores over channels that can shrink, and that stay, in words.
        input_shapes: by module with a `pretrained_cfg`, the shape of its first input.
    """

    graph: ChannelGraph
    unruled: frozenset[str]
    repairs: tuple[str, ...]
    positional: int
    example: Any
    batch: bool = True
    written: frozenset[str] = frozenset()
    constants: tuple[str, ...] = ()
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Tracer:
    """One trace of one model.

    Attributes:
        flow: the state of the trace.
        batches: the length of the batch in eval() mode, which is the example's, and in train() mode: twice as long if
            the trace `doubles` it, so that a length of the batch is told from other sizes.
        copy: the meta copy that runs.
        tensors: its parameters, buffers and tensor attributes by name.
        labels: by the name of a floating point tensor, one label for each axis.
        atoms_of_weights: how many atoms these labels have.
        describer: it collects the attributes that only describe modules.
        recorder: it runs the copy.
        records: the runs so far.
        written: paths of attributes that hold numbers or texts, and that a run changed.
        live: ids of the weights that outputs depend on, or what the model keeps.
        outputs: the names of the outputs of all runs.
        caches: attributes of the model that hold what an earlier run has computed.
        holdings: the tensors and numbers that modules hold beside weights, before the first run and after each.
        filled: what of these the runs have kept.
        attributes: paths of the attributes that the modules had before any run.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        keep_output: bool | Sequence[str] = True,
        whole_heads: Sequence[str] = (),
        doubles: bool = True,
        equal_shares: bool = False,
    ) -> None:
        self.model, self.example, self.keep_output = model, example, keep_output
        self.outputs: dict[str, None] = {}
        self.doubles = doubles
        self.batches = {False: count_images(example), True: count_images(example) * (2 if doubles else 1)}
        self.whole_heads = tuple(whole_heads)
        self.flow = Flow(whole_heads, equal_shares)
        self.flow.images = self.batches[False] if doubles else 1
        self.copy = copy_to_meta(model)
        check_copy(self.copy, model)
        self.caches = find_caches(model, make_meta_example(example, self.batches[False]))
        empty_attributes(self.copy, self.caches)
        clear_caches(self.copy.modules())  # what an earlier run left there is of sizes without origins
        self.attributes = {f"{path}.{name}" for path, m in self.copy.named_modules() for name in m.__dict__}
        wrap_attributes(self.copy, model)
        wrap_floats(self.copy)
        self.tensors = named_tensors(self.copy)
        self.numbers = {name: factor for name, factor in find_number_tensors(model).items() if name in self.tensors}
        self.labels = {n: self._label_tensor(n, t) for n, t in self.tensors.items() if t.is_floating_point()}
        self.atoms_of_weights = len(self.flow.atoms)
        self.describer = Describer(self.flow, self.copy)
        data = named_tensors(model)
        foreign = {id(tensor): name for name, tensor in data.items()}
        self.recorder = LabelRecorder(self.copy, self.flow, foreign, self.describer, self.numbers, data)
        self.records: list[RunRecord] = []
        self.written: set[str] = set()
        self.live: set[int] = set()
        self.holdings: list[Holdings] = []
        self.filled: Holdings = {}

    def _label_tensor(self, name: str, tensor: Tensor) -> list[Label]:
        """Label every axis of a weight with new atoms, except height and width of a convolution's kernel."""
        labels = self.flow.create_labels(tensor)
        if tensor.dim() == 2 and labels[1] is not None:
            self.flow.matrix_columns[int(labels[1][0])] = labels[1]
        if isinstance(self.copy.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvNd):
            labels = [v if axis < 2 else None for axis, v in enumerate(labels)]
            self.flow.set_labels(tensor, labels)
        return labels

    def run(self, outer: OuterState) -> Trace:
        """Trace in both modes, solve, prove, repair; the graph has no groups if no channel can be removed.

        Args:
            outer: what the model's code keeps outside of the model.

        Raises:
            TraceError: the forward raises, or no subnet can run.
            WidthError: a glob of `whole_heads` matches no module that splits channels into heads.
        """
        outer.empty_caches(self.copy)  # of another trace, or of an earlier run
        empty_attributes(self.copy, self.caches)
        self.holdings = [list_holdings(self.copy)]
        self.describer.watch_features()
        notes = self._record_both_modes()
        self._check_batches()
        self._check_globs()
        self._check_outputs()
        self.flow.bind_equal_attributes(self.describer.uses)
        read = self.recorder.scales.read
        HeadBinder(self.copy, self.flow, self.records, self.numbers, self.attributes, read).bind(self.describer)
        self._freeze_unused_tensors()
        meta_example = make_meta_example(self.example, self.batches[False])
        known = self.recorder.values.is_known
        self.filled = drop_memories(find_filled(*self.holdings), known, self._copy_without_caches, meta_example)
        for (path, name), value in self.filled.items():
            self.recorder.freeze_kept(path, name, value)
        unsaved = self.labels.keys() - set(self.copy.state_dict())
        constrain_unsaved(self.copy, self.labels, unsaved, self.flow.constraints)
        described = self.describer
        described.uses += self._find_uses_elsewhere(outer)
        uses = [*self.flow.constraints.attributes, *described.uses]
        described.uses += Surroundings(self.copy, uses, described.inputs, described.outputs, self.labels).find_uses()
        graph = freeze_refilled(freeze_tables(self._solve(), self.labels), self.model, self.labels, unsaved)
        graph, strays = freeze_strays(graph, self.model)
        graph, repairs = repair(
            keep_answers(graph, [*self.flow.checks, *list_size_checks(graph)]), self._make_prover(outer)
        )
        names = {o.name for record in self.records for o in record.operators}
        unruled = frozenset(name.rpartition(".")[0] for name in names if not ops.has_rule(name))
        example = self.example
        positional = len(example) if isinstance(example, tuple) else 0 if isinstance(example, Mapping) else 1
        example, written = make_meta_example(example, self.batches[False]), frozenset(self.written)
        constants = tuple(dict.fromkeys(self._list_constants(graph)))
        shapes = self.recorder.input_shapes
        repairs = [*notes, *strays, *repairs]
        return Trace(graph, unruled, tuple(repairs), positional, example, self.doubles, written, constants, shapes)

    def _copy_without_caches(self) -> nn.Module:
        """Return a meta copy of the model that has not run."""
        meta_copy = copy_to_meta(self.model).eval()
        empty_attributes(meta_copy, self.caches)
        return meta_copy

    def _check_batches(self) -> None:
        """Make sure that the run in eval() mode does not compute with what that in train() mode, of two batches, keeps.

        Raises:
            TraceError: it does.
        """
        before, after = self.holdings[:2]
        if not self.doubles or all(v is before.get(p) for p, v in after.items() if isinstance(v, Tensor)):
            return
        try:
            example = make_meta_example(self.example, self.batches[False])
            alone = Recorder(self._copy_without_caches(), data=named_tensors(self.model)).run(example)
        except Exception:  # whatever the model raises that cannot run in eval() mode first
            return
        record = next(record for record in self.records if not record.training)
        if record.exits[-1].shapes != tuple(tuple(t.shape) for t in collect_tensors(alone)):
            got = "another batch in its outputs after a call with a longer one, of which it keeps something"
            raise TraceError.at("the model", got=got, needed="a forward that takes batches of any length in turn")

    def _find_uses_elsewhere(self, outer: OuterState) -> list[AttributeUse]:
        """Return the uses of attributes in methods that may take the place of a forward, from traces with these."""
        bound = {use.path for use in (*self.flow.constraints.attributes, *self.describer.uses)}
        uses: list[AttributeUse] = []
        for name, paths in list_other_forwards(self.copy, bound).items():
            settings = self.whole_heads, self.doubles, self.flow.equal_shares
            other = Tracer(self.model, self.example, self.keep_output, *settings)
            for path in paths:
                module = other.copy.get_submodule(path)
                module.__dict__["forward"] = getattr(module, name)
            outer.empty_caches(other.copy)
            with contextlib.suppress(TraceError):
                other._record(training=False)
                uses += [use for use in other.list_uses_of_weights(self.flow) if use.path not in bound]
        outer.empty_caches(self.copy)
        return uses

    def list_uses_of_weights(self, flow: Flow) -> Iterator[AttributeUse]:
        """Yield the attributes that count channels of weights, by atoms that are the same in every trace.

        Left out are those whose channels only this trace joins, and not the other one, whose `flow` is given: there the
        attribute would count a part of its channels.
        """
        atoms = np.arange(self.atoms_of_weights)
        roots, roots_there = self.flow.atoms.find(atoms), flow.atoms.find(atoms)
        for use in self.flow.constraints.attributes:
            if use.vector is not None:
                vector = self.flow.atoms.find(use.vector)  # the smallest atoms; those of weights are created first
                joined = np.isin(roots, vector)
                if vector.max() < self.atoms_of_weights and np.isin(roots_there[joined], roots_there[vector]).all():
                    yield replace(use, vector=vector)

    def _check_outputs(self) -> None:
        """Make sure that every glob of `keep_output` has matched an output."""
        for glob in () if isinstance(self.keep_output, bool) else self.keep_output:
            if not any(matches(name, glob) for name in self.outputs):
                got, remedy = f"a glob ({glob!r}) that matches no output", "the only output has no name"
                remedy = describe_near(glob, filter(None, self.outputs)) if any(self.outputs) else remedy
                raise WidthError.at("keep_output", got=got, needed="True, False or globs of outputs", remedy=remedy)

    def _check_globs(self) -> None:
        """Make sure that every glob of `whole_heads` has matched a module."""
        for glob in set(self.flow.whole_heads) - self.flow.matching_globs:
            got = f"a glob ({glob!r}) that matches no such module"
            raise WidthError.at("whole_heads", got=got, needed="globs of modules that split channels into heads")

    def _list_constants(self, graph: ChannelGraph) -> Iterator[str]:
        """Yield the numbers that multiply attention scores and are no scale, where the channels can shrink."""
        for scores in [scores for record in self.records for scores in record.scores]:
            assert scores.label is not None
            if graph.make_count(scores.label).terms:
                for factor in scores.find_constants():
                    where = factor.path or f"{scores.path or 'the model'}: a number"
                    length = scores.count_channels(scores.across)
                    yield f"{where} multiplies attention scores over {length} channels by {factor.value:.6g}"

    def _list_written(self) -> Iterator[str]:
        """Yield the attributes that hold numbers or texts and that the forward has changed, such as counters."""
        for path, module in self.model.named_modules():
            now = self.copy.get_submodule(path).__dict__
            for name, value in module.__dict__.items():
                if _holds_numbers(value) and not (_holds_numbers(now.get(name)) and now[name] == value):
                    yield f"{path}.{name}" if path else name

    def _solve(self) -> ChannelGraph:
        """Return the channel graph of all observations so far."""
        shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
        parameters = [n for n, t in self.tensors.items() if isinstance(t, nn.Parameter)]
        uses = [use for use in self.describer.uses if not self._is_new(use.path)]
        observations = observe(self.flow, self.labels, shapes, parameters, uses, find_tied_names(self.copy))
        used = self.recorder.used_ids - self.live
        observations = replace(observations, dropped=tuple(n for n in parameters if id(self.tensors[n]) in used))
        return ChannelGraph.from_observations(observations)

    def _is_new(self, path: str) -> bool:
        """Whether a run has set an attribute that its module did not have: a subnet has it only once it ran."""
        module, _, name = path.rpartition(".")
        with contextlib.suppress(AttributeError):  # what stands in a list or dict of a module is no new attribute
            return name in self.copy.get_submodule(module).__dict__ and f"{module}.{name}" not in self.attributes
        return False

    def _record_both_modes(self) -> list[str]:
        """Run the model in both modes; that it reads data in train() mode alone is no obstacle, but noted."""
        try:
            self._record(training=True)
        except TraceError as error:
            if not self.recorder.has_read_data(error.__cause__):
                raise
            try:
                self._record(training=False)
            except TraceError:
                raise error from error.__cause__
            reason = str(error).partition("; needed:")[0]
            return [f"{reason}; so its forward in eval() mode alone was traced, and that in train() mode is unproven"]
        self._record(training=False)
        return self._record_gradients()

    def _record_gradients(self) -> list[str]:
        """Run the model with gradients enabled too, in both modes, if its code asks whether they are."""
        notes = []
        for training in (True, False) if self.flow.asks_gradients else ():
            try:
                self._record(training, gradients=True)
            except TraceError as error:
                reason = str(error).partition("; needed:")[0]
                notes.append(f"{reason}; with gradients enabled, about which its code asks: that path is unproven")
        return notes

    def _record(self, training: bool, gradients: bool = False) -> None:
        """Run the model once, with labels on all tensors, and record the run."""
        self.copy.train(training)
        self.recorder.start()
        self.recorder.gradients = gradients
        self.flow.count_macs = not training and not gradients
        example = make_meta_example(self.example, self.batches[training])
        for tensor in collect_tensors(example):
            labels = self.flow.create_labels(tensor)
            self.flow.freeze_label(labels[1] if len(labels) > 1 else None, "a channel of the model's input")
            self.flow.set_labels(tensor, [v if d == 1 else None for d, v in enumerate(labels)])
        recorder = self.recorder
        try:
            with without_gradients(self.copy), recorder.recording():
                out = run_model(self.copy, example)
                self.flow.count_macs = False
                recorder.dependence.is_over = True
                self.records.append(recorder.get_record())
                if not training and not gradients:
                    with contextlib.suppress(Exception):  # a model without the methods of timm's is traced as well
                        self.describer.describe_model(example)
        except TraceError:
            raise
        except Exception as error:
            reads_data, returned = recorder.has_read_data(error), recorder.list_returned()
            text = explain_failure(
                error, self.copy, recorder.last_path, recorder.last_shapes, reads_data=reads_data, returned=returned,
                example=example,
            )  # fmt: skip
            raise TraceError(text) from error
        self._freeze_outputs(out, training)
        self.holdings.append(list_holdings(self.copy))
        weights = [tensor for tensor in self.tensors.values() if isinstance(tensor, nn.Parameter)]
        others = [*self.holdings[-1].values(), *self.tensors.values()]  # a recurrent layer holds its weights in a list
        state = [value for value in others if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)]
        self.live |= recorder.dependence.list_live(collect_tensors(out), state, weights)
        self.written.update(self._list_written())

    def _freeze_outputs(self, out: Any, training: bool) -> None:
        tensors = collect_tensors(out)
        if not tensors and not training:
            raise TraceError.at(
                "the model",
                got=f"a {type(out).__name__} without a tensor from its forward in eval() mode",
                needed="a tensor, or a tuple, list, dict or object that holds one",
            )
        keep = self.keep_output
        for name, tensor in name_tensors(out):
            self.outputs[name] = None
            if keep if isinstance(keep, bool) else any(matches(name, glob) for glob in keep):
                for label in self.flow.get_labels(tensor):
                    self.flow.constraints.freeze(label, OUTPUT)

    def _freeze_unused_tensors(self) -> None:
        """Freeze tensors that no operator reads."""
        for name, tensor in self.tensors.items():
            if id(tensor) not in self.recorder.used_ids:
                for label in self.labels.get(name, []):
                    self.flow.constraints.freeze(label, UNUSED)

    def _make_prover(self, outer: OuterState) -> Prover:
        """Return what compares subnets with the records; they get what the widest has kept."""
        meta_copy, data = copy_to_meta(self.model), named_tensors(self.model)  # a copy without labels and hooks
        filled, kept = self.filled, None
        modes = [record.training for record in self.records if not record.gradients]
        examples = [(training, make_meta_example(self.example, self.batches[training])) for training in modes]
        empty_attributes(meta_copy, self.caches)
        if filled:
            for training, example in examples:
                runner = Recorder(meta_copy.train(training), data=data)
                runner.run(example)
                runner.release()
        numbers = {place: value for place, value in filled.items() if type(value) in (int, float)}
        fresh = copy_to_meta(self.model) if filled else meta_copy
        if filled:
            empty_attributes(fresh, self.caches)
        if numbers:
            kept = KeptNumbers(numbers, fresh, meta_copy, examples, data)
        more = data, kept, outer, fresh, self.flow.lengths
        return Prover(meta_copy, self.example, self.records, self.batches, self.numbers, *more)


def _holds_numbers(value: Any) -> bool:
    members = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(member, (int, float, str)) for member in members)
