"""The table of operator rules, and what happens to an operator that is not in it."""

from __future__ import annotations

from collections.abc import Callable

from timm_autoslim.errors import TraceError
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops.schema import OperatorCall, tensors_in_lists
from timm_autoslim.utils.tables import Table

Rule = Callable[[Flow, OperatorCall], None]
RULES: Table[Rule] = Table("operator", TraceError)


def freeze_inputs(flow: Flow, op: OperatorCall, reason: str) -> None:
    """Keep every channel that enters the operator; none leaves it."""
    for tensor in op.tensors:
        flow.freeze_labels(flow.get_labels(tensor), reason)
    for tensor in tensors_in_lists(op.out):
        flow.set_labels(tensor, [None] * tensor.dim())
