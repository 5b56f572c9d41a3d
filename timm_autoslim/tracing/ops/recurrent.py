"""Recurrent layers, taken whole: unrolled into operators they would make thousands of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.labels import Label, Vector
from timm_autoslim.tracing.ops.table import tensors_in

# Gates by torch function. All take (input, states, weights, has_biases, layers, dropout, train, bidirectional,
# batch_first), and the weights of one direction of one layer are (gates * H, I), (gates * H, H) and two biases.
LAYERS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def outputs(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return empty tensors of the shapes that the layer returns: its output and its last states.

    Raises:
        RuntimeError: the weights are of other shapes than input and states ask for.
    """
    x, states, hidden = args[0], tensors_in(args[1]), tensors_in(args[1])[0].shape[-1]
    width = x.shape[-1]
    for layer in _layers(args):
        for w_in, w_hidden, *biases in layer:
            gates = w_hidden.shape[0] // hidden * hidden
            shapes = [tuple(t.shape) for t in (w_in, w_hidden, *biases)]
            if shapes != [(gates, width), (gates, hidden), *[(gates,)] * len(biases)]:
                raise RuntimeError(f"a recurrent layer from {width} to {hidden} channels has weights of {shapes}")
        width = hidden * len(layer)
    return (x.new_empty(*x.shape[:-1], hidden * (2 if args[7] else 1)), *(torch.empty_like(s) for s in states))


def _layers(args: tuple[Any, ...]) -> list[list[list[Tensor]]]:
    """Return the weights by layer and direction; none for kinds that are kept whole (projections, packed input)."""
    weights, layers, directions = args[2], args[4], 2 if args[7] else 1
    each = len(weights) // (layers * directions)
    if each not in (2, 4) or len(args) != 9:
        return []
    parts = [list(weights[i : i + each]) for i in range(0, len(weights), each)]
    return [parts[i : i + directions] for i in range(0, len(parts), directions)]


def run(flow: Flow, name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Label the outputs: in each direction one vector of hidden units, which its gates and its state share."""
    states, entering = [flow.labels(t) for t in tensors_in(args[1])], flow.labels(args[0])
    flow.freeze_all(entering[:-1], "a recurrent layer runs along it")
    leaving, units = entering[-1], [s[-1] for s in states if s[-1] is not None]
    for layer in _layers(args):
        made = [_direction(flow, name, args[0], leaving, weights) for weights in layer]
        units += made
        leaving = np.concatenate(made)
    found = outputs(args)
    if not _layers(args):
        for tensor in tensors_in(args[:3]):
            flow.freeze_all(flow.labels(tensor), "a recurrent layer of this kind keeps all its channels")
        leaving = None
    flow.constraints.tie_counts(units)  # one attribute holds their number
    flow.set_labels(found[0], [*entering[:-1], leaving])
    for state, labels in zip(found[1:], states, strict=True):
        flow.set_labels(state, labels)
    flow.produce(leaving)
    return found


def _direction(flow: Flow, name: str, x: Tensor, entering: Label, weights: list[Tensor]) -> Vector:
    """Tie the gates of one direction of one layer, count its MACs, and return its hidden units."""
    (rows, columns), (_, unit) = flow.labels(weights[0]), flow.labels(weights[1])
    if unit is None:  # a single hidden unit
        unit = flow.atoms.fresh(1)
    if entering is not None or columns is not None:
        flow.join(entering, columns, "a recurrent layer")
    for tensor in weights:
        gates = flow.labels(tensor)[0]
        if gates is not None:
            for gate in gates.reshape(LAYERS[name], -1):
                flow.atoms.join(unit, gate)
    steps = x.shape[:-1].numel()
    flow.contract(steps, [(weights[0].shape[0], rows), (weights[0].shape[1], columns)])
    flow.contract(steps, [(weights[1].shape[0], rows), (weights[1].shape[1], unit)])
    return unit


class Shapes(TorchFunctionMode):
    """Give the shapes of recurrent layers without running them; all else runs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LAYERS:
            return outputs(args)
        return func(*args, **(kwargs or {}))
