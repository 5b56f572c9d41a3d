"""Prove a graph, and freeze more channels where a subnet does not run as it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from timm_autoslim.errors import TraceError
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.label_recorder import RunRecord
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.prove import Disagreement, Prover

MAX_REPAIRS = 40


def repair(graph: ChannelGraph, prover: Prover) -> tuple[ChannelGraph, list[str]]:
    """Run subnets; where one disagrees with the graph, freeze more channels and start again.

    If half width runs and a width of 1 fails (statistics over a single value), a floor of 2 is tried first.

    Returns:
        The proven graph, and the reasons for which more was frozen.

    Raises:
        TraceError: subnets fail whatever is frozen, or after `MAX_REPAIRS` repairs.
    """
    repairs: list[str] = []
    failure = ""  # of a width of 1, after which the floor became 2
    for _ in range(MAX_REPAIRS):
        fault = next(prover.find_faults(graph), None) if graph.group_sizes else None
        if fault is None:
            return graph, repairs
        reason = f"{fault.path or 'the model'}: in a subnet, {fault}"
        if fault.half_runs and not failure:
            failure, graph = reason, replace(graph, floor=2)
            continue
        if fault.half_runs and reason.partition(":")[0] == failure.partition(":")[0]:
            graph = replace(graph, floor=1)  # the width of 1 was not the cause
        repairs.append(reason)
        graph = _freeze_suspects(graph, prover.records, fault, reason)
    raise TraceError.at(
        "the model",
        got=f"subnets that still fail after {MAX_REPAIRS} repairs (the last: {repairs[-1]})",
        needed="a model whose subnets run as the channel graph predicts",
    )


def _freeze_suspects(
    graph: ChannelGraph, records: Sequence[RunRecord], fault: Disagreement, reason: str
) -> ChannelGraph:
    """Freeze larger and larger sets of suspects, until a group has become smaller."""
    for labels in _list_suspects(records, fault):
        graph, before = graph.freeze(labels, reason), graph
        if sum(graph.group_sizes) < sum(before.group_sizes):
            return graph
    raise TraceError.at(
        "the model",
        got=f"a subnet that fails whatever is frozen ({reason})",
        needed="a model whose subnets run as the channel graph predicts",
    )


def _list_suspects(records: Sequence[RunRecord], fault: Disagreement) -> Iterator[list[Label]]:
    """Yield larger and larger sets of labels that may be at fault: of the operator, of the module, of its parents."""
    operators = [o for run in records for o in run.operators]
    yield [v for o in operators if o.path == fault.path and o.name == fault.operator for v in o.labels]
    yield list(fault.labels)
    path = fault.path
    while True:
        yield [v for o in operators if o.path == path for v in o.labels]
        inside = [o for o in operators if o.path == path or o.path.startswith(path + ".") or not path]
        yield [v for o in inside for v in o.labels]
        if not path:
            return
        path = path.rpartition(".")[0]
