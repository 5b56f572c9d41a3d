"""Prove a channel graph: run subnets, and compare their shapes with those that the graph predicts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from timm_autoslim.errors import TraceError
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.tracing.caches import KeptNumbers
from timm_autoslim.tracing.flow import Length
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.label_recorder import RunRecord
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.ops import bind
from timm_autoslim.tracing.origins import FromDimension, Number, evaluate, list_leaves, strip_origin
from timm_autoslim.tracing.outer_state import OuterState
from timm_autoslim.tracing.passing import Calls, Expectation, Values, freeze_calls
from timm_autoslim.tracing.record import Recorder
from timm_autoslim.tracing.scales import Factor, ScaleTracker
from timm_autoslim.tracing.sites import Site, find_culprits, format_site
from timm_autoslim.tracing.strays import explain_stray
from timm_autoslim.utils.meta import make_meta_example, without_gradients
from timm_autoslim.utils.tensors import collect_tensors, named_tensors

_RANDOM = 2  # subnets of random widths that run
_LENGTHS = 16  # those of which lengths are computed alone, which takes little time


class Disagreement(Exception):
    """A subnet did not run as the graph predicts.

    Attributes:
        path: the module that differs.
        operator: the operator that failed; None if none did.
        labels: the labels of the tensor whose shape differs.
        half_runs: whether the subnet of half width ran as predicted.
    """

    def __init__(self, message: str, path: str, operator: str | None = None, labels: Sequence[Label] = ()) -> None:
        super().__init__(message)
        self.path, self.operator, self.labels = path, operator, labels
        self.half_runs = False


class _ComparingRecorder(Recorder):
    """Runs a subnet, and compares its modules with the record, and their outputs with the shapes of the graph.

    Operators are not compared: which ones torch runs also depends on the strides of tensors.
    """

    def __init__(
        self,
        subnet: nn.Module,
        record: RunRecord,
        active: NDArray[np.bool_],
        scales: ScaleTracker | None = None,
        data: Mapping[str, Tensor] | None = None,
        strays: Mapping[int, str] | None = None,
    ) -> None:
        """Compare the next run of `subnet` with a record.

        Args:
            subnet: a replica of the model that ran.
            record: the run of the widest.
            active: true for the atoms that the subnet has.
            scales: it follows the numbers that multiply attention scores.
            data: by name, the model's tensors with data.
            strays: the names by id of those tensors of which the subnet has a slice, and that it must not read.
        """
        super().__init__(subnet, data=data)
        self.strays, self.stray, self.stray_path = strays or {}, "", ""
        self.gradients = record.gradients
        self.exits, self.active, self.position = record.exits, active, 0
        self.record, self.scales = record, scales
        if scales is not None:
            scales.read_constant = self.values.read_constant

    def leave(self, path: str, module: nn.Module, out: Any) -> None:
        """Compare what a module returns with what it returned in the record."""
        expected = self.exits[min(self.position, len(self.exits) - 1)]
        self.position += 1
        if expected.path != path:
            raise Disagreement(f"this module runs where the widest subnet runs {expected.path}", path)
        for tensor, labels, shape in zip(collect_tensors(out), expected.labels, expected.shapes, strict=True):
            lengths = tuple(n if v is None else int(self.active[v].sum()) for n, v in zip(shape, labels, strict=True))
            if tuple(tensor.shape) != lengths:
                message = f"an output has the shape {tuple(tensor.shape)} instead of {lengths}"
                raise Disagreement(message, path, None, labels)

    def run_operator(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator; if it raises, the subnet disagrees."""
        for tensor in collect_tensors([args, kwargs]) if self.strays else ():
            if id(tensor) in self.strays:
                self.stray, self.stray_path = self.strays[id(tensor)], self.stack.path
        try:
            out = super().run_operator(func, args, kwargs)
        except Exception as error:
            raise Disagreement(f"{func} fails: {error}", self.stack.path, str(func)) from error
        if self.scales is not None:
            self.scales.follow(bind(func, args, kwargs, out), self.stack.path)
        return out

    def compare_scales(self) -> None:
        """Compare the numbers that multiplied attention scores: scales have followed the channels."""
        scores_of_subnet = {} if self.scales is None else {(s.path, s.index): s for s in self.scales.scores}
        for scores in self.record.scores if scores_of_subnet else ():
            scale, subnet = scores.find_scale(), scores_of_subnet.get((scores.path, scores.index))
            if not scale or (subnet is None and all(factor.path for factor in scale)):
                continue
            power = sum(scale[factor] for factor in scores.factors if factor in scale)
            length = scores.count_channels(scores.across)
            active = length if subnet is None else subnet.count_channels(scores.across)
            needed = scores.multiply() * (active / length) ** power
            now = math.nan if subnet is None else subnet.multiply()
            if not math.isclose(now, needed, rel_tol=1e-5 + 2 * sum(factor.tolerance for factor in scale)):
                message = f"attention scores over {active} of {length} channels are still multiplied by {now:.4g}"
                raise Disagreement(message, scores.path, None, [scores.label])


def _keep_tensors(first: Sequence[Values], later: Sequence[Values]) -> bool:
    """Whether a later run passes a tensor with data, which an earlier one has kept, for one that it computes."""
    pairs = (pair for calls in zip(first, later, strict=False) for pair in zip(*calls, strict=False))
    return any(a is None and isinstance(b, str) for a, b in pairs)


def _narrow(graph: ChannelGraph, widths: Sequence[int], groups: Collection[int]) -> list[int]:
    """Return the widths of a subnet of which these groups alone are narrower than in the widest."""
    return [widths[i] if i in groups else size for i, size in enumerate(graph.group_sizes)]


def _find_site(graph: ChannelGraph, find: Callable[[Sequence[int]], set[Site]]) -> tuple[Site, list[Label]] | None:
    """Return the first place in the code where a subnet differs, and the channels that decide it; None if none does.

    Args:
        graph: the channel graph.
        find: returns the places that differ if these groups alone are narrower; those of no group do not count.
    """
    every = range(len(graph.group_sizes))
    sites = find(every)
    if not sites or not (sites := sites - (ignored := find(()))):
        return None
    site = min(sites, key=lambda site: (format_site(site), site[2]))
    culprits = find_culprits(every, lambda groups: bool(find(groups) - ignored))
    return site, [graph.find_vector(group) for group in culprits]


class Prover:
    """Runs a meta copy of a model as any subnet, and compares it with the records of the widest."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        records: Sequence[RunRecord],
        batches: Mapping[bool, int],
        numbers: Mapping[str, Factor] | None = None,
        data: Mapping[str, Tensor] | None = None,
        kept: KeptNumbers | None = None,
        outer: OuterState | None = None,
        fresh: nn.Module | None = None,
        lengths: Sequence[Length] = (),
    ) -> None:
        """Prepare proofs.

        Args:
            model: a meta copy.
            example: inputs of it.
            records: the runs of the widest.
            batches: the lengths of the batch in eval() mode (False) and in train() mode.
            numbers: the tensors of the model that stand for one number.
            data: by name, the tensors with data.
            kept: ordinary numbers that the widest has left.
            outer: what the model's code keeps outside of the model.
            fresh: a meta copy that has not run.
            lengths: what the widest's code has computed from sizes, and passed as lengths.
        """
        self.kept, self.outer, self.fresh = kept, outer, fresh
        self._harmless: set[Site] = set()  # sites that caches decide
        self._is_checked = False  # whether a run of the widest with ordinary sizes was compared with the records
        self.model, self.example, self.records, self.numbers = model, example, records, dict(numbers or {})
        self.batches, self.data, self.lengths = batches, data, lengths

    def find_faults(self, graph: ChannelGraph) -> Iterator[Disagreement]:
        """Yield the disagreements at half, narrowest and random widths, in both modes."""
        rng = np.random.default_rng(0)
        sizes, floors = graph.group_sizes, graph.floors
        half = graph.half_widths
        random = [
            [int(rng.integers(low, n + 1)) for low, n in zip(floors, sizes, strict=True)] for _ in range(_LENGTHS)
        ]
        yield from self._check_lengths(graph, (half, floors, *random))
        for widths in (half, floors, *random[:_RANDOM]):
            for record in self.records:
                try:
                    self._compare(graph, widths, record, check_scales=widths is half)
                except Disagreement as fault:
                    self._check_widest(graph)
                    fault.half_runs = widths is not half
                    yield fault
            if widths is half and self.kept is not None:
                yield from self._find_stale(graph, half)
            if widths is half and self.outer is not None and self.outer.has_numbers():
                yield from self._find_numbers_outside(graph, half)

    def _find_numbers_outside(self, graph: ChannelGraph, widths: Sequence[int]) -> Iterator[Disagreement]:
        """Yield the disagreement that a subnet passes a number which the widest has left outside of the model."""

        def find(groups: Sequence[int]) -> set[Site]:
            some = _narrow(graph, widths, groups)
            self._run_all(graph, self.model, graph.group_sizes)
            later, first = self._run_on(graph, self.model, some), self._run_all(graph, self.model, some)
            pairs = [
                (a[site], b[site], site) for a, b in zip(later, first, strict=True) for site in a.keys() & b.keys()
            ]
            return {site for a, b, site in pairs if len(a) == len(b) and repr(a) != repr(b)}

        if fault := _find_site(graph, find):
            site, labels = fault
            place = format_site(site)
            message = f"the code passes a number at {place} that it keeps outside of the model for all subnets"
            yield Disagreement(message, site[0], None, labels)

    def _find_stale(self, graph: ChannelGraph, widths: Sequence[int]) -> Iterator[Disagreement]:
        """Yield the disagreement that a subnet gets a number which the widest has kept, and would compute another."""

        def find(groups: Sequence[int]) -> tuple[str, str] | None:
            assert self.kept is not None
            return self.kept.find_stale(graph.slices(_narrow(graph, widths, groups)))

        every = range(len(graph.group_sizes))
        place = find(every)
        if place is not None:
            culprits = find_culprits(every, lambda groups: find(groups) is not None)
            message = f"its forward keeps {place[1]}, which has another value if the subnet runs first"
            yield Disagreement(message, place[0], None, [graph.find_vector(group) for group in culprits])

    def _compare(self, graph: ChannelGraph, widths: Sequence[int], record: RunRecord, check_scales: bool) -> None:
        slices, active = graph.slices(widths), graph.find_active(widths)
        with without_gradients(self.model) if record.gradients else contextlib.nullcontext():
            subnet = replicate(self.model.train(record.training), slices)
        scales = self._follow_scales(subnet, slices) if check_scales and record.scores else None
        strays = {id(t): name for name, t in named_tensors(self.model).items() if name in slices.tensors}
        recorder = _ComparingRecorder(subnet, record, active, scales, self.data, strays)
        try:
            recorder.run(make_meta_example(self.example, self.batches[record.training]))
            if recorder.stray:
                vectors = graph.observations.vectors
                labels = [vector for (name, _), vector in vectors.items() if name == recorder.stray]
                raise Disagreement("it reads a weight of the model itself", recorder.stray_path, None, labels)
            recorder.compare_scales()
            differing = self._expect(slices, active).find_differing(record.calls, recorder.calls)
            if not differing <= self._harmless:
                self._check_widest(graph)
                self._compare_calls(graph, widths, record)
                self._harmless |= differing
        except Disagreement as fault:
            if recorder.stray:
                message = explain_stray(self.model, recorder.stray)
                raise Disagreement(message, fault.path, fault.operator, fault.labels) from fault
            raise
        except TraceError:
            raise
        except Exception as error:
            path = recorder.stack.interrupted or ""
            raise Disagreement(f"its forward raises {type(error).__name__}: {error}", path) from error
        finally:
            recorder.release()

    def _check_lengths(self, graph: ChannelGraph, subnets: Sequence[Sequence[int]]) -> Iterator[Disagreement]:
        """Yield the disagreement that the code computes another length than the channels there have in a subnet.

        Shapes do not show it where parts of one tensor are joined again: a cut may lie elsewhere.
        """
        for widths in subnets if self.lengths else ():
            active = graph.find_active(widths)
            expectation = self._expect(graph.slices(widths), active)
            for length in self.lengths:
                count = int(length.size) if length.label is None else int(active[length.label].sum())
                try:
                    computed = evaluate(length.size, expectation.get_size)
                except ArithmeticError as error:
                    computed = error
                if computed != count:
                    leaves = list_leaves((length.size,))
                    vectors = [leaf.origin.vector for leaf in leaves if isinstance(leaf.origin, FromDimension)]
                    message = f"the code computes the length or place {computed} where {count} channels are"
                    yield Disagreement(message, length.path, None, [length.label, *vectors])

    def _expect(self, slices: Slices, active: NDArray[np.bool_]) -> Expectation:
        """Return what a subnet passes to functions of torch if the graph knows where all numbers come from."""

        def get_size(number: Number) -> int:
            if isinstance(number.origin, FromDimension):
                return int(active[number.origin.vector].sum())
            return int(slices.attributes.get(number.origin.path, strip_origin(number)))

        @cache
        def list_ratios(path: str) -> Collection[float]:
            operators = (o for record in self.records for o in record.operators if o.path == path)
            shares = {float(active[v].mean()) for o in operators for v in o.labels if v is not None}
            return shares - {0.0, 1.0}

        def get_attribute(path: str) -> Any:
            owner, _, name = path.rpartition(".")
            return getattr(self.model.get_submodule(owner), name)

        return Expectation(get_size, slices.attributes, list_ratios, get_attribute)

    def _check_widest(self, graph: ChannelGraph) -> None:
        """Compare a run of the widest, in which sizes are ordinary integers, with the records.

        Raises:
            TraceError: it takes another path, because the code asks for the type of a size.
        """
        if self._is_checked or self.fresh is None:
            return
        self._is_checked = True
        sizes = graph.group_sizes
        expectation = self._expect(graph.slices(sizes), graph.find_active(sizes))
        first, again = (self._run_all(graph, self.fresh, sizes) for _ in range(2))
        for record, calls, repeated in zip(self.records, first, again, strict=True):
            differing = expectation.find_differing(record.calls, calls) - expectation.find_differing(calls, repeated)
            if differing and not any(_keep_tensors(record.calls.get(s, ()), calls.get(s, ())) for s in differing):
                raise TraceError.at(
                    min(map(format_site, differing)),
                    got="a path that changes where sizes remember their origin, as by `type(size) is int`",
                    needed="code whose path does not depend on that",
                    remedy="ask isinstance(size, int) there",
                )

    def _compare_calls(self, graph: ChannelGraph, widths: Sequence[int], record: RunRecord) -> None:
        """Raise a disagreement if a subnet calls functions of torch elsewhere than the widest, or with other numbers.

        What a cache decides is none: both run with empty caches.
        """
        index = next(i for i, other in enumerate(self.records) if other is record)

        def find(groups: Sequence[int]) -> set[Site]:
            some = _narrow(graph, widths, groups)
            calls = self._run_all(graph, self.model, some)[index]
            return self._expect(graph.slices(some), graph.find_active(some)).find_differing(record.calls, calls)

        if fault := _find_site(graph, find):
            site, labels = fault
            calls = self._run_all(graph, self.model, widths)[index]
            same = len(calls.get(site, ())) == len(record.calls.get(site, ()))
            what = "passes another number or text" if same else "takes another path"
            message = f"the code {what} at {format_site(site)}, which depends on the number of channels"
            raise Disagreement(message, site[0], None, labels)

    def _run_all(self, graph: ChannelGraph, model: nn.Module, widths: Sequence[int]) -> list[Calls]:
        """Return what a subnet passes to functions of torch in all runs, from empty caches; up to an error."""
        if self.outer is not None:
            self.outer.empty_caches()
        return self._run_on(graph, model, widths)

    def _run_on(self, graph: ChannelGraph, model: nn.Module, widths: Sequence[int]) -> list[Calls]:
        """Return what a subnet passes to functions of torch in all runs, after earlier runs; up to an error."""
        with without_gradients(model):
            subnet = replicate(model, graph.slices(widths))
        calls = []
        for record in self.records:
            runner = Recorder(subnet.train(record.training), data=self.data)
            runner.gradients = record.gradients
            with contextlib.suppress(Exception):
                runner.run(make_meta_example(self.example, self.batches[record.training]))
            calls.append(freeze_calls(runner.calls))
            runner.release()
        return calls

    def _follow_scales(self, subnet: nn.Module, slices: Slices) -> ScaleTracker:
        """Return a tracker for a subnet, whose tensors have no data: their numbers are those of its slices."""
        tensors, numbers = named_tensors(subnet), dict(self.numbers)
        for name in numbers.keys() & slices.attributes.keys():
            value = slices.attributes[name]
            assert isinstance(value, float)
            numbers[name] = replace(numbers[name], value=value)
        return ScaleTracker({id(tensors[name]): factor for name, factor in numbers.items() if name in tensors})
