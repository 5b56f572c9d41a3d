"""An operator's arguments, by the names that its schema gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from timm_autoslim.errors import TraceError


@dataclass(frozen=True, slots=True)
class OperatorCall:
    """One call of an operator.

    Attributes:
        operator: its name with the namespace and without the overload (`aten.add`).
        arguments: every argument of the schema by its name, in the schema's order; what the call leaves out has the
            schema's default.
        tensors: every tensor among the arguments, those in lists too, in the schema's order.
        out: what the operator returned.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 8)
        >>> op = bind(torch.ops.aten.split.Tensor, (x, 4), {}, ())
        >>> op["split_size"], op["dim"]
        (4, 0)
        >>> op.name, len(op.tensors)
        ('split', 1)
    """

    operator: str
    arguments: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    out: Any

    @property
    def name(self) -> str:
        """The name in the table of rules: without the overload, and `add` alone for `aten.add`."""
        return self.operator.removeprefix("aten.")

    def __getitem__(self, argument: str) -> Any:
        """Return the argument of this name.

        Raises:
            TraceError: the schema has no such argument.
        """
        try:
            return self.arguments[argument]
        except KeyError:
            needed = f"one of {list(self.arguments)}"
            raise TraceError.at(f"the rule of {self.operator}", got=f"argument {argument!r}", needed=needed) from None

    def get(self, argument: str, default: Any = None) -> Any:
        """Return the argument of this name, or `default` where this overload has none."""
        return self.arguments.get(argument, default)


def bind(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> OperatorCall:
    """Name the arguments of one call."""
    schema = _schema(operator)
    arguments = schema.defaults | dict(zip(schema.defaults, args, strict=False)) | kwargs
    tensors = tensors_in_lists([arguments[name] for name in schema.tensors])
    return OperatorCall(schema.operator, arguments, tuple(tensors), out)


@dataclass(frozen=True)
class _Schema:
    """An operator's name, its arguments with their defaults (None where there is none), and those that are tensors."""

    operator: str
    defaults: dict[str, Any]
    tensors: tuple[str, ...]


@cache
def _schema(operator: OpOverload) -> _Schema:
    """Read the schema of an operator."""
    arguments = operator._schema.arguments
    values = {a.name: a.default_value for a in arguments}
    defaults = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    tensors = tuple(a.name for a in arguments if "Tensor" in str(a.type))  # Tensor, Optional[Tensor], List[Tensor]
    return _Schema(operator._schema.name.replace("::", "."), defaults, tensors)


@cache
def list_written(operator: OpOverload) -> tuple[str, ...]:
    """Return the names of the arguments that an operator writes to."""
    return tuple(a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def tensors_in_lists(values: Any) -> list[Tensor]:
    """Return every tensor in nested tuples and lists: an operator takes and returns no others."""
    if isinstance(values, Tensor):
        return [values]
    tensors: list[Tensor] = []
    if isinstance(values, (tuple, list)):
        for value in values:  # most are numbers
            if isinstance(value, (Tensor, tuple, list)):
                tensors += tensors_in_lists(value)
    return tensors
