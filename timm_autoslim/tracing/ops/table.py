"""The table of operator rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from timm_autoslim.tracing.flow import Flow

Rule = Callable[[Flow, tuple[Any, ...], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register one rule for these ATen operators; a name that has a rule already is an error."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"the operator aten.{name} has a rule already: {RULES[name].__name__}")
            RULES[name] = function
        return function

    return register


def tensors_in(values: Any) -> list[Tensor]:
    """Return every tensor among the arguments or results of an operator."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (tuple, list)):
        return [t for v in values for t in tensors_in(v)]
    return []


def unknown(flow: Flow, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Freeze what enters an operator that has no rule."""
    for tensor in tensors_in([*args, *kwargs.values()]):
        flow.freeze_all(flow.labels(tensor), f"the operator {name} has no rule")
    for tensor in tensors_in(out):
        flow.set_labels(tensor, [None] * tensor.dim())
