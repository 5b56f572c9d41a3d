"""Recurrent layers, taken whole: unrolled into operators they would make thousands of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops.table import tensors_in

# torch.lstm(input, hx, weights, has_biases, layers, dropout, train, bidirectional, batch_first)
LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def outputs(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return empty tensors of the shapes that the layer returns: its output and its last states."""
    x, states, directions = args[0], tensors_in(args[1]), 2 if args[7] else 1
    hidden = states[0].shape[-1]
    return (x.new_empty(*x.shape[:-1], hidden * directions), *(torch.empty_like(s) for s in states))


def run(flow: Flow, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Fix every channel of a recurrent layer: its module keeps its weights in a flat list of its own."""
    for tensor in tensors_in(args[:3]):
        flow.freeze_all(flow.labels(tensor), "a recurrent layer keeps all its channels")
    steps = args[0].shape[:-1].numel()
    for weight in args[2]:
        if weight.dim() == 2:
            flow.contract(steps, [(weight.shape[0], None), (weight.shape[1], None)])
    return outputs(args)


class Shapes(TorchFunctionMode):
    """Give the shapes of recurrent layers without running them; all else runs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LAYERS:
            return outputs(args)
        return func(*args, **(kwargs or {}))
