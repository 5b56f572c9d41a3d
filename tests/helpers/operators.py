"""Operator rules by themselves: one operator runs on labelled tensors of the meta device, and its rule with it."""

import torch

from timm_autoslim.tracing import ops
from timm_autoslim.tracing.calls import FunctionCall
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops import tensors_in_lists

aten = torch.ops.aten


def tensor(*shape):
    """Return a tensor of this shape on the meta device."""
    return torch.empty(shape, device="meta")


def names_of(operator):
    """Return the names of an operator's arguments."""
    return [argument.name for argument in operator._schema.arguments]


def by_position(operator, *values):
    """Return `args` and `kwargs` with everything by position that may stand there."""
    positions = sum(not argument.kwarg_only for argument in operator._schema.arguments)
    rest = dict(zip(names_of(operator)[positions:], values[positions:], strict=False))
    return values[:positions], rest


def by_name(operator, *values):
    """Return `args` and `kwargs` with everything by name, the last argument first."""
    return (), dict(reversed(list(zip(names_of(operator), values, strict=False))))


def run_rule(operator, *values, passing=by_position, function="a_function"):
    """Run an operator and its rule on tensors whose dimensions all carry channels of their own.

    Args:
        operator: an overload.
        values: its arguments, in the schema's order.
        passing: how they are passed.
        function: the torch function that the model's code called.

    Returns:
        All that the rule did, comparable: the labels by tensor with joined channels under one number, and what it
        added to the flow.
    """
    flow = Flow()
    flow.stack.paths.append("layer")
    flow.count_macs = True
    inputs = tensors_in_lists(values)
    for value in inputs:
        flow.create_labels(value)
    args, kwargs = passing(operator, *values)
    flow.call = FunctionCall(function, args, kwargs)
    out = ops.execute(operator, args, kwargs)
    ops.run(flow, ops.bind(operator, args, kwargs, out))
    return read_outcome(flow, inputs, tensors_in_lists(out))


def read_outcome(flow, inputs, outputs):
    """Return what a flow holds about these tensors, and everything else in it."""
    roots = flow.atoms.find_all()

    def read(vector):
        return None if vector is None else roots[vector].tolist()

    constraints = flow.constraints
    return {
        "inputs": [[read(v) for v in flow.get_labels(t)] for t in inputs],
        "outputs": [[read(v) for v in flow.get_labels(t)] for t in outputs],
        "frozen_vectors": [(read(v), reason) for v, reason in constraints.frozen_vectors],
        "count_ties": [[read(v) for v in vectors] for vectors in constraints.count_ties],
        "ordered_vectors": [read(v) for v in constraints.ordered_vectors],
        "producers": [(path, read(v)) for path, v in constraints.producers],
        "contractions": [(c.constant, [read(v) for v in c.vectors]) for c in flow.contractions],
    }


def reasons(outcome):
    """Return why channels were frozen, without the module."""
    return {reason.removeprefix("layer: ") for _, reason in outcome["frozen_vectors"]}
