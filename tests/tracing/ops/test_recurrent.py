"""Recurrent layers as one operator: their arguments by name, their shapes, and their labels."""

import pytest
import torch
from helpers.models import randomise
from helpers.operators import read_outcome, reasons, tensor
from torch import nn

from timm_autoslim import convert
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops import recurrent, tensors_in_lists
from timm_autoslim.tracing.record import Recorder

NAMES = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}


def arguments(name, layers=2, bidirectional=False, width=6, hidden=4, biases=True):
    """Return the arguments of one of torch's functions, in its order."""
    gates, directions = recurrent.LAYERS[name], 2 if bidirectional else 1
    params = []
    for layer in range(layers):
        fan_in = hidden * directions if layer else width
        for _ in range(directions):
            params += [tensor(gates * hidden, fan_in), tensor(gates * hidden, hidden)]
            params += [tensor(gates * hidden), tensor(gates * hidden)] if biases else []
    states = [tensor(layers * directions, 3, hidden) for _ in range(STATES[name])]
    hx = states if name == "lstm" else states[0]
    return [tensor(3, 5, width), hx, params, biases, layers, 0.0, True, bidirectional, True]


def run(name, values, args, kwargs):
    """Run the rule on labelled tensors; return what it did."""
    flow = Flow()
    flow.stack.paths.append("layer")
    flow.count_macs = True
    inputs = tensors_in_lists(values)
    for value in inputs:
        flow.create_labels(value)
    return read_outcome(flow, inputs, recurrent.run(flow, name, args, kwargs))


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("name", recurrent.LAYERS)
def test_names_and_positions_give_the_same_labels(name, bidirectional, biases):
    values = arguments(name, bidirectional=bidirectional, biases=biases)
    by_name = dict(reversed(list(zip(NAMES, values, strict=True))))
    assert run(name, values, values, {}) == run(name, values, (), by_name)
    assert run(name, values, values, {}) == run(name, values, values[:2], dict(zip(NAMES[2:], values[2:], strict=True)))


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize(("name", "kind"), [("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn_tanh", nn.RNN)])
def test_shapes_are_those_of_torch(name, kind, bidirectional):
    values = arguments(name, bidirectional=bidirectional)
    out, states = kind(6, 4, 2, batch_first=True, bidirectional=bidirectional)(torch.zeros(3, 5, 6))
    expected = [tuple(t.shape) for t in tensors_in_lists((out, states))]
    assert [tuple(t.shape) for t in recurrent.make_outputs(values, {})] == expected


def test_gates_share_the_hidden_channels_of_their_direction():
    values = arguments("lstm", layers=1)
    outcome = run("lstm", values, values, {})
    x, _, _, w_in, w_hidden, b_in, b_hidden = outcome["inputs"]
    out = outcome["outputs"][0]
    assert out[2] == w_hidden[1]
    assert w_in[1] == x[2]
    for rows in (w_in[0], w_hidden[0], b_in[0], b_hidden[0]):
        assert rows == w_hidden[1] * 4
    assert outcome["contractions"] == [(15, [w_in[0], w_in[1]]), (15, [w_hidden[0], w_hidden[1]])]


def test_weights_that_do_not_fit_are_told():
    values = arguments("gru")
    values[2][0] = tensor(12, 7)
    with pytest.raises(RuntimeError, match="a recurrent layer from 6 to 4 channels has weights of"):
        recurrent.make_outputs(values, {})


def test_projections_keep_all_channels_but_those_of_the_input():
    values = arguments("lstm", layers=1)
    values[1][0] = tensor(1, 3, 2)  # states of the projection
    values[2] = [tensor(16, 6), tensor(16, 2), tensor(16), tensor(16), tensor(2, 4)]
    outcome = run("lstm", values, values, {})
    assert outcome["outputs"][0][2] is None
    assert outcome["inputs"][3][1] == outcome["inputs"][0][2]
    assert all(vector != outcome["inputs"][0][2] for vector, _ in outcome["frozen_vectors"])
    assert "a recurrent layer with projections or packed input keeps its states" in reasons(outcome)


@pytest.mark.parametrize("name", recurrent.LAYERS)
def test_packed_input_has_its_own_order_of_arguments(name):
    _, hx, params, *rest = arguments(name)
    sizes = torch.zeros(5, dtype=torch.long, device="meta")
    values = [tensor(15, 6), sizes, hx, params, *rest[:-1]]
    assert recurrent.make_outputs(values, {})[0].shape == (15, 4)
    outcome = run(name, values, values, {})
    assert outcome["outputs"][0][1] is None
    assert "a recurrent layer with projections or packed input keeps its states" in reasons(outcome)
    names = ("data", "batch_sizes", *NAMES[1:-1])
    assert outcome == run(name, values, (), dict(zip(names, values, strict=True)))


class Packed(nn.Module):
    """A recurrent layer on a packed sequence."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(6, 8), nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        lengths = torch.full((x.shape[0],), x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0].mean(1))


class Projecting(nn.Module):
    """Two recurrent layers with projections, in both directions."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(6, 5)
        self.layer = nn.LSTM(8, 4, 2, batch_first=True, proj_size=3, bidirectional=True)

    def forward(self, x):
        return self.head(self.layer(self.stem(x))[0].mean(1))


@pytest.mark.parametrize("kind", [Packed, Projecting])
def test_the_input_of_packed_and_projecting_layers_can_shrink(kind):
    model, x = randomise(kind()).eval(), torch.randn(2, 7, 6)
    supernet = convert(model, x)
    assert supernet.space.max().to_dict() == {"stem": 8}
    assert any("keeps its states" in reason for reason in supernet.graph.fixed.values())
    widths = supernet.space.from_dict({"stem": 3})
    slim = supernet.extract(widths)
    assert slim.layer.input_size == 3
    assert torch.equal(slim(x), supernet(x, widths))


def test_shapes_are_given_without_running_the_layer():
    layer = nn.LSTM(6, 4, batch_first=True).to("meta")
    out, (last, cell) = Recorder(layer).run(tensor(3, 5, 6))
    assert (out.shape, last.shape, cell.shape) == ((3, 5, 4), (1, 3, 4), (1, 3, 4))


class Started(nn.Module):
    """A recurrent layer that starts from a given state, or whose last state is read."""

    def __init__(self, kind, layers, bidirectional, use):
        super().__init__()
        self.use, self.rows, self.size = use, layers * (1 + bidirectional), 6
        self.stem, self.bn = nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.layer = kind(8, 6, layers, batch_first=True, bidirectional=bidirectional)
        self.next = kind(8, 6, layers, batch_first=True, bidirectional=bidirectional)
        self.start, self.cell = nn.Parameter(torch.randn(self.rows, 1, 6)), nn.Parameter(torch.randn(self.rows, 1, 6))
        self.first, self.head, self.last = nn.Linear(8, 6), nn.Linear(6 * (1 + bidirectional), 3), nn.Linear(6, 3)

    def pair(self, state, cell=None):
        return (state, state if cell is None else cell) if isinstance(self.layer, nn.LSTM) else state

    def forward(self, x):
        x = self.bn(self.stem(x).transpose(1, 2)).transpose(1, 2).relu()
        return self.use(self, x)


def start(make):
    return lambda s, x: s.head(s.layer(x, s.pair(*make(s, x)))[0])


def get_last(s, returned):
    return returned[1][0] if isinstance(s.layer, nn.LSTM) else returned[1]


USES = {
    "a parameter": start(lambda s, x: [s.start.expand(-1, len(x), -1).contiguous()]),
    "two parameters": start(lambda s, x: [s.start.repeat(1, len(x), 1), s.cell.repeat(1, len(x), 1)]),
    "zeros of an attribute": start(lambda s, x: [torch.zeros(s.rows, len(x), s.size)]),
    "zeros like the layer's": start(lambda s, x: [x.new_zeros(s.rows, len(x), s.layer.hidden_size)]),
    "what was computed": start(lambda s, x: [s.first(x.mean(1)).tanh()[None].repeat(s.rows, 1, 1)]),
    "the last state": lambda s, x: s.last(get_last(s, s.layer(x))[-1]),
    "the mean of the last states": lambda s, x: s.last(get_last(s, s.layer(x)).mean(0)),
    "another layer's last state": lambda s, x: s.head(s.next(x, s.layer(x)[1])[0]),
    "the last state from a parameter": lambda s, x: s.last(
        get_last(s, s.layer(x, s.pair(s.start.repeat(1, len(x), 1))))[0]
    ),
}


@pytest.mark.parametrize(
    ("kind", "layers", "bidirectional"),
    [
        pytest.param(nn.LSTM, 1, False, marks=pytest.mark.slow),
        (nn.LSTM, 2, True),
        pytest.param(nn.GRU, 1, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("use", USES)
def test_the_states_of_a_layer_have_its_channels(kind, layers, bidirectional, use):
    model = randomise(Started(kind, layers, bidirectional, USES[use])).eval()
    sequence = torch.randn(3, 4, 5)
    with torch.no_grad():
        expected = model(sequence)
        supernet = convert(model, torch.zeros(2, 4, 5), order="l1").eval()  # whose channels are in another order
        assert torch.allclose(supernet(sequence), expected, atol=1e-5)
        assert {"stem", "first" if use == "what was computed" else "layer"} <= set(supernet.space.names)
        assert not supernet.repairs
        for share in (0.5, 0.2):
            widths = supernet.space.uniform(share)
            assert torch.equal(supernet(sequence, widths), supernet.extract(widths).eval()(sequence))


def test_a_state_of_a_literal_size_holds_the_layer_alone():
    use = start(lambda s, x: [x.new_zeros(1, len(x), 6)])
    supernet = convert(randomise(Started(nn.LSTM, 1, False, use)).eval(), torch.zeros(2, 4, 5))
    assert supernet.space.names == ("stem",)
    assert supernet.graph.fixed["layer.weight_hh_l0", 1] == (
        "layer: a recurrent layer starts from a state that cannot shrink"
    )
