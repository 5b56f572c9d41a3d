"""One rule for each ATen operator: how labels flow from its inputs to its outputs.

A rule is a function `(flow, args, kwargs, out)` that reads the labels of the inputs and sets those of the output.
Names in the table are those of the operator's overload packet (`aten.add`, without the overload). To teach the
tracer an operator, write such a function here and name the operator in its `@rule` line. An operator without a
rule freezes every channel that enters it and is reported, so an unknown operator can cost reach, never correctness.
"""

from __future__ import annotations

from typing import Any

import torch

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops import contraction, elementwise, movement, reduction
from timm_autoslim.tracing.ops.hollow import execute
from timm_autoslim.tracing.ops.table import RULES, rule, tensors_in, unknown

__all__ = [
    "RULES",
    "contraction",
    "elementwise",
    "execute",
    "has_rule",
    "movement",
    "reduction",
    "rule",
    "run",
    "tensors_in",
]


def has_rule(operator: str) -> bool:
    """Whether this operator (`aten.add.Tensor`) has a rule."""
    namespace, packet, *_ = operator.split(".")
    return namespace == "aten" and packet in RULES


def run(flow: Flow, operator: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Apply the rule of one operator, or freeze what enters it."""
    packet = operator._schema.name.split("::")[1]
    flow.operator = packet
    for tensor in tensors_in([*args, *kwargs.values()]):
        flow.use(tensor)
    if has_rule(str(operator)):
        RULES[packet](flow, args, kwargs, out)
    else:
        unknown(flow, str(operator).rpartition(".")[0], args, kwargs, out)
