"""Recurrent layers, each as one step: as operators they would be thousands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.labelling import Labels
from timm_autoslim.tracing.labels import Label, Vector
from timm_autoslim.tracing.ops.schema import tensors_in_lists

# Torch's functions, and how many gates the weights of each hold.
LAYERS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class RecurrentCall:
    """The arguments of one call of these functions, under torch's names and in torch's order.

    Packed input comes with `batch_sizes`, and without `batch_first`.
    """

    input: Tensor  # (N, T, I), (T, N, I) or (T, I); packed (steps, I)
    hx: Tensor | Sequence[Tensor]  # the states, of lstm two: (layers * directions, N, H) or (layers * directions, H)
    params: Sequence[Tensor]  # for each layer and direction: (gates * H, I), (gates * H, H) and two or no biases
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool = False
    batch_sizes: Tensor | None = None

    @property
    def states(self) -> list[Tensor]:
        """The states at the start; those at the end have the same shapes."""
        return tensors_in_lists(self.hx)

    @property
    def directions(self) -> int:
        """How often each layer runs: once, or twice (also from the end)."""
        return 2 if self.bidirectional else 1

    def list_inputs(self) -> list[Tensor]:
        """Return the weights (gates * H, I) that the input is multiplied by, one for each direction."""
        each = len(self.params) // (self.num_layers * self.directions)
        return [self.params[direction * each] for direction in range(self.directions)]

    def list_layers(self) -> list[list[list[Tensor]]]:
        """Return the weights by layer and direction; none for projections and packed input, whose states all stay."""
        each = len(self.params) // (self.num_layers * self.directions)
        if each not in (2, 4) or self.batch_sizes is not None:
            return []
        parts = [list(self.params[i : i + each]) for i in range(0, len(self.params), each)]
        return [parts[i : i + self.directions] for i in range(0, len(parts), self.directions)]

    def make_outputs(self) -> tuple[Tensor, ...]:
        """Return empty tensors of the shapes of what the layer returns: its output and its last states.

        Raises:
            RuntimeError: the shapes of the weights do not fit the input and the states.
        """
        hidden, width = self.states[0].shape[-1], self.input.shape[-1]
        shapes = [tuple(w_in.shape) for w_in in self.list_inputs()]
        if not self.list_layers() and any(shape[1] != width for shape in shapes):
            raise RuntimeError(f"a recurrent layer gets {width} channels, and has weights of {shapes}")
        for layer in self.list_layers():
            for w_in, w_hidden, *biases in layer:
                gates = w_hidden.shape[0] // hidden * hidden
                shapes = [tuple(t.shape) for t in (w_in, w_hidden, *biases)]
                if shapes != [(gates, width), (gates, hidden), *[(gates,)] * len(biases)]:
                    raise RuntimeError(f"a recurrent layer from {width} to {hidden} channels has weights of {shapes}")
            width = hidden * self.directions
        out = self.input.new_empty(*self.input.shape[:-1], hidden * self.directions)
        return (out, *(torch.empty_like(state) for state in self.states))


def _name_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> RecurrentCall:
    """Name the arguments of one call; of packed input they are `data`, `batch_sizes`, and the rest without the last."""
    batch_sizes = args[1] if len(args) > 1 else kwargs.get("batch_sizes")
    if not isinstance(batch_sizes, Tensor) or batch_sizes.is_floating_point():  # states stand there
        return RecurrentCall(*args, **kwargs)
    by_name = {"input" if name == "data" else name: value for name, value in kwargs.items()}
    return RecurrentCall(*args[:1], *args[2:], **{**by_name, "batch_sizes": batch_sizes})


def make_outputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return empty tensors of the shapes of what the layer returns.

    Raises:
        RuntimeError: the shapes of the weights do not fit the input and the states.
    """
    return _name_arguments(args, kwargs).make_outputs()


def run(flow: Flow, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Label the outputs: in each direction one vector of hidden channels, which its gates and its state share."""
    call = _name_arguments(args, kwargs)
    for state in call.states:
        flow.mark_read(state)
    states = [flow.get_labels(state) for state in call.states]
    for labels in states:
        flow.freeze_labels(labels[:-1], "a recurrent layer has a state for each layer and direction")
    *outer, channels = flow.get_labels(call.input)
    flow.freeze_labels(outer, "a recurrent layer treats this dimension as steps, not channels")
    hidden: list[Vector] = []
    for layer in call.list_layers():
        vectors = [_label_direction(flow, LAYERS[name], call.input, channels, weights) for weights in layer]
        hidden += vectors
        channels = np.concatenate(vectors)
    out, *last_states = call.make_outputs()
    if not call.list_layers():
        _freeze_states(flow, call, channels)
        channels = None
    else:
        _tie_states(flow, hidden, [labels[-1] for labels in states])
    flow.set_labels(out, [*outer, channels])
    for state, labels in zip(last_states, states, strict=True):
        flow.set_labels(state, [*labels[:-1], hidden[0]] if hidden and state.shape[-1] > 1 else labels)
        if len(hidden) > 1:
            flow.mark_rows(state, hidden)
    flow.add_producer(channels)
    return (out, *last_states)


def _freeze_states(flow: Flow, call: RecurrentCall, channels: Label) -> None:
    """Freeze all but the channels of the input."""
    weights = call.list_inputs()
    for w_in in weights:
        columns = flow.get_labels(w_in)[1]
        if channels is not None or columns is not None:
            flow.join(channels, columns, "a recurrent layer")
    labels = [label for tensor in (*call.states, *call.params) for label in flow.get_labels(tensor)]
    inputs = {id(flow.get_labels(w_in)[1]) for w_in in weights}
    flow.freeze_labels(
        [label for label in labels if id(label) not in inputs],
        "a recurrent layer with projections or packed input keeps its states",
    )


def _tie_states(flow: Flow, hidden: list[Vector], states: Labels) -> None:
    """Tie the hidden channels of all layers and directions to those of the states that they start from."""
    flow.constraints.tie_counts(hidden)  # one attribute holds their number
    for label in states:
        if label is None and len(hidden[0]) > 1:
            flow.freeze_labels(hidden, "a recurrent layer starts from a state that cannot shrink")
        elif label is not None and flow.is_new(label):  # of equal numbers, such as zeros: any of them will do
            flow.constraints.tie_counts([hidden[0], label])
        elif label is not None:
            for vector in hidden:
                flow.atoms.join(label, vector)


def _label_direction(flow: Flow, gates: int, x: Tensor, channels: Label, weights: list[Tensor]) -> Vector:
    """Tie the gates of one direction of one layer, count its MACs, and return its hidden channels."""
    w_in, w_hidden, *_ = weights  # (gates * H, I), (gates * H, H)
    (rows, columns), (_, hidden) = flow.get_labels(w_in), flow.get_labels(w_hidden)
    if hidden is None:  # a single one
        hidden = flow.atoms.create(1)
    if channels is not None or columns is not None:
        flow.join(channels, columns, "a recurrent layer")
    for tensor in weights:
        label = flow.get_labels(tensor)[0]
        if label is not None:
            for gate in label.reshape(gates, -1):
                flow.atoms.join(hidden, gate)
    steps = x.shape[:-1].numel()
    flow.add_contraction(steps, [(w_in.shape[0], rows), (w_in.shape[1], columns)])
    flow.add_contraction(steps, [(w_hidden.shape[0], rows), (w_hidden.shape[1], hidden)])
    return hidden
