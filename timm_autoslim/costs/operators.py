"""Single operators of a tape: their functions, their arguments as text and as tensors, and how long they take."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch.nn import functional as F

from timm_autoslim.costs.inputs import make_tensor
from timm_autoslim.costs.measure import time_runs, use_threads
from timm_autoslim.costs.recorder import ATTENTION, Operator, TensorSpec
from timm_autoslim.costs.runtimes import Runtime
from timm_autoslim.errors import LatencyError

# Operators whose kernels a runtime keeps; it fuses or removes most of the others.
_HEAVY = ("aten.convolution", "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", ATTENTION, "lstm", "gru", "rnn")


def is_heavy(operator: Operator) -> bool:
    """Whether an operator does most of a model's work: a convolution, product, attention or recurrent layer."""
    return operator.name.startswith(_HEAVY)


def is_timed_in(runtime: Runtime, operator: Operator) -> bool:
    """Whether an operator is timed in the runtime itself, if the runtime has it; else in eager mode."""
    return is_heavy(operator) or not runtime.fuses


def find_function(name: str) -> Callable[..., Any]:
    """Return the function that a tape's operator names."""
    if name == ATTENTION:
        return F.scaled_dot_product_attention
    if "." not in name:
        return getattr(torch, name)  # type: ignore[no-any-return]
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)  # type: ignore[no-any-return]


@cache
def is_view(name: str) -> bool:
    """Whether an operator only looks at its input in another way."""
    schema = getattr(find_function(name), "_schema", None)
    return schema is not None and any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)


def format_operator(operator: Operator) -> str:
    """Return an operator with its arguments as a short text; equal texts take equal time."""
    return f"{operator.name}{_format(operator.args)}{_format(operator.kwargs)}"


def _format(value: Any) -> str:
    if isinstance(value, TensorSpec):
        order = "" if value.order == tuple(range(len(value.shape))) else f"/{','.join(map(str, value.order))}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{order}".replace(" ", "")
    if isinstance(value, tuple):
        return f"({','.join(map(_format, value))})"
    if isinstance(value, dict):
        return "".join(f",{key}={_format(v)}" for key, v in value.items())
    return str(value)


def make_arguments(value: Any, device: torch.device) -> Any:
    """Return arguments with tensors on the device in place of their specifications."""
    if isinstance(value, TensorSpec):
        tensor = make_tensor([value.shape[d] for d in value.order], value.dtype, device)
        return tensor.permute([value.order.index(d) for d in range(len(value.shape))]) if value.order else tensor
    if isinstance(value, tuple):
        return tuple(make_arguments(v, device) for v in value)
    if isinstance(value, dict):
        return {key: make_arguments(v, device) for key, v in value.items()}
    return device if isinstance(value, torch.device) else value


def count_bytes(arguments: tuple[Any, ...]) -> int:
    """Return the bytes of all tensors among an operator's arguments."""
    total = 0
    for argument in arguments:
        if isinstance(argument, TensorSpec):
            total += prod(argument.shape) * argument.dtype.itemsize
        elif isinstance(argument, tuple):
            total += count_bytes(argument)
    return total


def measure_operator(operator: Operator, runtime: Runtime, device: torch.device, threads: int) -> float:
    """Return the milliseconds of one operator by itself, on arguments of its shapes and types.

    Raises:
        LatencyError: it cannot run by itself.
    """
    function = find_function(operator.name)
    with use_threads(threads), torch.no_grad():
        try:
            args, kwargs = make_arguments(operator.args, device), make_arguments(operator.kwargs, device)
            run = partial(function, *args, **kwargs)
            if is_timed_in(runtime, operator) and runtime.time_operator is not None:
                milliseconds = runtime.time_operator(operator, run, device, threads)
                if milliseconds is not None:
                    return milliseconds
            return time_runs(run, device, 5, 0.002)
        except Exception as error:  # an operator may raise anything on made-up arguments
            raise LatencyError(
                f"{operator.path or 'the model'}: {operator.name} cannot be measured by itself "
                f"({type(error).__name__}: {str(error)[:200]}); measure subnets with measure_latency"
            ) from error
