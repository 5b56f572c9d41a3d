"""One rule for each ATen operator: how labels flow from its inputs to its outputs.

A rule is a function `(flow, op)` that reads the labels of the inputs and sets those of the output. `op` has the
operator's arguments by the names of its schema (`op["weight"]`), and its result (`op.out`). Names in the table are
those of operators without the overload (`add` for `aten.add.Tensor`). To teach the tracer an operator, write such a
function in the file of its family, and name the operator in its `@RULES.add` line. An operator without a rule freezes
every channel that enters it and is reported, so an unknown operator can cost reach, never correctness.
"""

from __future__ import annotations

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops import contraction, elementwise, fourier, indexing, rearranging, reduction, views
from timm_autoslim.tracing.ops.meta_kernels import execute
from timm_autoslim.tracing.ops.schema import OperatorCall, bind, tensors_in_lists
from timm_autoslim.tracing.ops.table import RULES, freeze_inputs

__all__ = [
    "RULES",
    "OperatorCall",
    "bind",
    "contraction",
    "elementwise",
    "execute",
    "fourier",
    "has_rule",
    "indexing",
    "rearranging",
    "reduction",
    "run",
    "tensors_in_lists",
    "views",
]


def has_rule(operator: str) -> bool:
    """Whether this operator (`aten.add.Tensor`, or without the overload) has a rule."""
    return ".".join(operator.split(".")[:2]).removeprefix("aten.") in RULES


def run(flow: Flow, op: OperatorCall) -> None:
    """Apply the rule of one operator, or freeze what enters it."""
    for tensor in op.tensors:
        flow.mark_read(tensor)
    if has_rule(op.operator):
        RULES[op.name](flow, op)
    else:
        freeze_inputs(flow, op, f"the operator {op.operator} has no rule")
