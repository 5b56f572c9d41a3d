"""Traces of small networks: what an operator ties together, what it holds with its reason, and what stays free."""

import sys

import pytest
import torch
from helpers.bodies import IMAGE, Around, conv, convert_around
from helpers.models import TwoGroups, randomise
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert, cost
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.trace import trace_model


def shuffled(self, x):
    x = self.wide(x)
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return self.after(x)


def gated(self, x):
    a, b = self.wide(x).chunk(2, 1)
    return a * b.sigmoid()


def unlike_halves(self, x):
    a, b = self.wide(x).chunk(2, 1)
    return self.one(a) + self.two(b)


def squeezed(self, x):
    return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def concatenated(self, x):
    return self.join(torch.cat([x, self.side(x), x], 1))


def halves(self, x):
    x = self.wide(x)
    half = x.shape[1] // 2
    return x[:, :half] * x[:, half:]


def sliced_to_another(self, x):
    return self.wide(x)[:, : self.side.out_channels] + self.side(x)


def response_norm(self, x):
    energy = x.norm(p=2, dim=(2, 3), keepdim=True)
    return x * energy / (energy.mean(1, keepdim=True) + 1)


def flattened(self, x):
    return self.linear(F.adaptive_avg_pool2d(x, 2).flatten(1))[:, :, None, None]


# body, channels before the head, its layers, and the width groups that must come out
CASES = {
    "sequence": (lambda s, x: s.a(x).relu(), 6, {"a": conv(8, 6, 3)}, {"stem": 8, "a": 6}),
    "residual": (lambda s, x: x + s.a(x), 8, {"a": conv(8, 8)}, {"stem": 8}),
    "residual of residuals": (
        lambda s, x: s.b(s.a(x) + x).relu() + x, 8, {"a": conv(8, 8), "b": conv(8, 8)}, {"stem": 8}
    ),
    "batch norm": (lambda s, x: s.bn(x), 8, {"bn": nn.BatchNorm2d(8)}, {"stem": 8}),
    "layer norm": (
        lambda s, x: s.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 8, {"ln": nn.LayerNorm(8)}, {"stem": 8}
    ),
    "depthwise": (lambda s, x: s.a(x), 8, {"a": conv(8, 8, 3, groups=8)}, {"stem": 8}),
    "depthwise with multiplier": (lambda s, x: s.a(x), 16, {"a": conv(8, 16, 3, groups=8)}, {"stem": 8}),
    "grouped, by a share of every group": (
        lambda s, x: s.a(x), 12, {"a": conv(8, 12, 3, groups=2)}, {"stem": 4, "a": 6}
    ),
    "grouped, by whole groups": (lambda s, x: s.a(x), 8, {"a": conv(8, 8, 3, groups=4)}, {"stem": 4}),
    "concatenation": (concatenated, 8, {"side": conv(8, 6), "join": conv(22, 8)}, {"stem": 8, "side": 6, "join": 8}),
    "chunk": (gated, 6, {"wide": conv(8, 12)}, {"stem": 8, "wide": 6}),
    "chunk into unlike halves": (
        unlike_halves, 5, {"wide": conv(8, 12), "one": conv(6, 5), "two": conv(6, 5)}, {"stem": 8, "wide": 6, "one": 5}
    ),
    "squeeze and excite": (squeezed, 8, {"down": conv(8, 4), "up": conv(4, 8)}, {"stem": 8, "down": 4}),
    "flatten": (flattened, 6, {"linear": nn.Linear(32, 6)}, {"stem": 8, "linear": 6}),
    "prelu": (lambda s, x: s.act(x), 8, {"act": nn.PReLU(8)}, {"stem": 8}),
    "flip": (lambda s, x: x.flip(1) + x, 8, {}, {"stem": 4}),
    "pooling": (lambda s, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2), 8, {}, {"stem": 8}),
    "reused layer": (lambda s, x: s.a(s.a(x).relu()), 8, {"a": conv(8, 8)}, {"stem": 8}),
    "transposed": (lambda s, x: s.a(x), 6, {"a": nn.ConvTranspose2d(8, 6, 2, 2)}, {"stem": 8, "a": 6}),
    "transposed, by whole groups": (
        lambda s, x: s.a(x), 12, {"a": nn.ConvTranspose2d(8, 12, 2, 2, groups=4)}, {"stem": 4}
    ),
    "einsum": (lambda s, x: torch.einsum("nchw,dc->ndhw", x, s.a.weight), 6, {"a": nn.Linear(8, 6)}, None),
    "standardised weight": (
        lambda s, x: F.conv2d(x, s.a.weight - s.a.weight.mean((1, 2, 3), keepdim=True)), 6, {"a": conv(8, 6)}, None
    ),
    "group norm": (lambda s, x: s.gn(x), 8, {"gn": nn.GroupNorm(2, 8)}, {"stem": 4}),
    "one group norm": (lambda s, x: s.gn(x), 8, {"gn": nn.GroupNorm(1, 8)}, {"stem": 8}),
    "group norm over a concatenation": (
        lambda s, x: s.gn(torch.cat([x, s.side(x)], 1)), 16, {"side": conv(8, 8), "gn": nn.GroupNorm(4, 16)},
        {"stem": 2, "side": 2},
    ),
    "depthwise over a concatenation": (
        lambda s, x: s.a(torch.cat([x, s.side(x)], 1)), 16, {"side": conv(8, 8), "a": conv(16, 16, 3, groups=16)},
        {"stem": 8, "side": 8},
    ),
    "halves by a slice": (halves, 4, {"wide": conv(8, 8)}, {"stem": 8, "wide": 4}),
    "slice as long as another": (
        sliced_to_another, 3, {"wide": conv(8, 8), "side": conv(8, 3)}, {"stem": 8, "wide": 3, "wide:2": 5}
    ),
    "response norm": (response_norm, 8, {}, {"stem": 8}),
    "softmax over channels": (lambda s, x: s.a(x).softmax(1), 6, {"a": conv(8, 6)}, {"stem": 8, "a": 6}),
    "mean over channels": (lambda s, x: x * s.a(x).mean(1, keepdim=True), 8, {"a": conv(8, 6)}, {"stem": 8, "a": 6}),
    "maximum of pairs": (
        lambda s, x: s.a(x).view(x.shape[0], -1, 2, 8, 8).amax(2), 6, {"a": conv(8, 12)}, {"stem": 8, "a": 6}
    ),
    "stack": (lambda s, x: torch.stack([x, s.a(x)], 1).sum(1), 8, {"a": conv(8, 8)}, {"stem": 8}),
    "padded shortcut": (lambda s, x: s.a(x) + F.pad(x, (0, 0, 0, 0, 0, 4)), 12, {"a": conv(8, 12)}, {"stem": 8}),
    "attributes read as numbers": (
        lambda s, x: s.a(x) / s.a.out_channels * s.a.in_channels**-0.5, 6, {"a": conv(8, 6)}, {"stem": 8, "a": 6}
    ),
    "one dimension": (
        lambda s, x: s.a(x.flatten(2)).unsqueeze(-1), 6, {"a": nn.Conv1d(8, 6, 3)}, {"stem": 8, "a": 6}
    ),
    "batch norm without weights": (lambda s, x: s.bn(x), 8, {"bn": nn.BatchNorm2d(8, affine=False)}, {"stem": 8}),
    "batch norm without statistics": (
        lambda s, x: s.bn(x), 8, {"bn": nn.BatchNorm2d(8, track_running_stats=False)}, {"stem": 8}
    ),
    "shuffle": (
        lambda s, x: shuffled(s, x), 8, {"wide": conv(8, 8), "after": conv(8, 8)}, {"stem": 8, "wide": 4, "after": 8}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_width_groups_of_an_operator(name):
    body, last, layers, groups = CASES[name]
    supernet = convert_around(body, last, **layers)
    if groups is not None:
        assert supernet.space.max().to_dict() == groups
    assert supernet.repairs == ()


# body, channels before the head, its layers, a place that cannot shrink, and why; what is free beside it must stay free
FROZEN = {
    "literal split": (
        lambda s, x: torch.cat(s.a(x).split([4, 2], 1)[::-1], 1), 6, {"a": conv(8, 6)}, ("a.weight", 0),
        "the model: the code passes the constant 4 to split",
    ),
    "literal slice": (
        lambda s, x: s.a(x)[:, :4], 4, {"a": conv(8, 6)}, ("head.weight", 1),
        "the model: the code passes the constant 4 to __getitem__",
    ),
    "literal view": (
        lambda s, x: s.a(x).view(-1, 2, 3, 8, 8).transpose(1, 2).flatten(1, 2), 6, {"a": conv(8, 6)}, ("a.weight", 0),
        "the model: view splits these channels into the constant sizes [2, 3]",
    ),
    "an attribute that is also a size of something else": (
        lambda s, x: s.a(x).view(-1, s.a.out_channels, s.a.out_channels, s.a.out_channels), 8, {"a": conv(8, 8)},
        ("a.weight", 0), "the attribute a.out_channels is also the size of a dimension that cannot shrink",
    ),
    "an operator without a rule": (
        lambda s, x: torch.rot90(s.a(x), 1, (2, 3)), 6, {"a": conv(8, 6)}, ("a.weight", 0),
        "the model: the operator aten.rot90 has no rule",
    ),
    "an index of channels": (
        lambda s, x: x * s.a(x).argmax(1, keepdim=True), 8, {"a": conv(8, 6)}, ("a.weight", 0),
        "the model: it returns indices of these channels",
    ),
    "a layer that does not run": (lambda s, x: x, 8, {"a": conv(8, 6)}, ("a.weight", 0), "not used in forward"),
    "the input": (lambda s, x: x, 8, {}, ("stem.weight", 1), "the model: a channel of the model's input"),
    "the output": (lambda s, x: x, 8, {}, ("head.bias", 0), "an output of the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_followed_is_frozen_with_the_reason_and_nothing_else_is(name):
    body, last, layers, place, reason = FROZEN[name]
    supernet = convert_around(body, last, **layers)
    assert supernet.graph.fixed[place] == reason
    assert supernet.space["stem"].size == 8


def test_an_operator_that_is_taught_is_followed():
    body, last, layers, place, _ = FROZEN["an operator without a rule"]

    def extend(flow, op):
        flow.set_labels(op.out, flow.get_labels(op["self"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "RULES", {**ops.RULES, "rot90": extend})
        supernet = convert_around(body, last, **layers)
    assert place not in supernet.graph.fixed


def test_a_part_that_runs_only_in_training_is_traced_too():
    class Auxiliary(Around):
        def __init__(self):
            super().__init__(lambda s, x: s.a(x), 6, a=conv(8, 6), side=nn.Conv2d(6, 5, 1))

        def forward(self, x):
            y = self.body(self, self.stem(x))
            out = self.head(y).mean((2, 3))
            return (out, self.side(y).mean((2, 3))) if self.training else out

    model = randomise(Auxiliary())
    supernet = convert(model, IMAGE)
    assert supernet.space.max().to_dict() == {"stem": 8, "a": 6}
    slim = supernet.extract(supernet.space.from_dict({"stem": 3, "a": 2}))
    assert slim.side.weight.shape == (5, 2, 1, 1)
    for one, other in zip(
        slim.train()(IMAGE), supernet.train()(IMAGE, supernet.space.from_dict({"stem": 3, "a": 2})), strict=True
    ):
        assert torch.equal(one, other)
    assert cost(supernet).macs == 64 * (3 * 8 + 8 * 6 + 6 * 5)  # in eval mode


def test_a_trace_lists_the_operators_that_have_no_rule():
    assert trace_model(Around(lambda s, x: x.relu()), IMAGE).unruled == frozenset()
    turned = Around(lambda s, x: torch.rot90(s.b(s.a(x)), 1, (2, 3)), 6, a=conv(8, 8), b=conv(8, 6))
    assert trace_model(turned, IMAGE).unruled == {"aten.rot90"}
    supernet = convert(turned, IMAGE)
    assert supernet.unruled == ("aten.rot90",)
    assert supernet.repairs == ()


REACHED = {
    "dropout2d": (lambda s, x: nn.functional.dropout2d(s.a(x), 0.5, s.training), 8, {"a": conv(8, 8)}),
    "glu": (lambda s, x: nn.functional.glu(s.a(x), 1), 6, {"a": conv(8, 12)}),
    "pixel shuffle": (lambda s, x: nn.functional.pixel_shuffle(s.a(x), 2), 4, {"a": conv(8, 16)}),
    "pixel unshuffle": (lambda s, x: nn.functional.pixel_unshuffle(s.a(x), 2), 32, {"a": conv(8, 8)}),
    "a slice that counts from the end": (
        lambda s, x: nn.functional.pad(s.a(x), (0, 0, 0, 0, 0, 1), value=1.0)[:, :-1], 8, {"a": conv(8, 8)},
    ),
    "instance norm": (lambda s, x: s.n(s.a(x)), 8, {"a": conv(8, 8), "n": nn.InstanceNorm2d(8, affine=True)}),
}  # fmt: skip


@pytest.mark.parametrize("name", REACHED)
def test_channels_are_followed_through(name):
    body, last, layers = REACHED[name]
    supernet = convert_around(body, last, **layers)
    assert ("a.weight", 0) not in supernet.graph.fixed
    assert not supernet.repairs


def test_a_running_sum_over_channels_keeps_their_order():
    supernet = convert_around(lambda s, x: s.a(x).cumsum(1), 8, a=conv(8, 8))
    assert "depends on the order of these channels" in supernet.graph.fixed["a.weight", 0]


def make_waves(channels):
    frequencies = 100 ** (torch.arange(channels // 2) / (channels // 2 - 1))
    return torch.cat([frequencies.sin(), frequencies.cos()])[:, None, None]


def add_waves(self, x):
    return x + make_waves(x.shape[1])


class Waves(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("table", make_waves(channels))

    def forward(self, x):
        return x + self.table


def test_a_table_that_the_code_makes_for_the_width_that_it_finds_holds_the_channels():
    assert "a" in convert_around(lambda s, x: s.table(s.a(x)), 6, a=conv(8, 6), table=Waves(6)).space.names
    supernet = convert_around(lambda s, x: add_waves(s, s.a(x)), 6, a=conv(8, 6))
    assert "its code makes a table for the width that it finds (by arange)" in supernet.graph.fixed["a.weight", 0]


def count_calls(model):
    """Return how many Python functions a conversion calls."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        convert(model, IMAGE)
    finally:
        sys.setprofile(None)
    return count


def nest(kind, twice):
    """Return nested data of 14 levels; each of which holds the next one, or holds it twice."""
    data = [1]
    for _ in range(14):
        members = [data, data] if twice else [data]
        data = dict(enumerate(members)) if kind is dict else kind(members)
    return data


def keep_in_an_attribute(model, data):
    model.data = data


class Holder:
    """Holds data."""


def keep_in_an_object(model, data):
    model.holder = Holder()
    model.holder.data = data


def keep_in_a_closure(model, data):
    model.read = lambda: data


def keep_in_a_hook(model, data):
    model.stem.register_forward_hook(lambda *_: data and None)


KEEP = (keep_in_an_attribute, keep_in_an_object, keep_in_a_closure, keep_in_a_hook)


@pytest.mark.parametrize(
    ("kind", "keep"), [*zip((dict, list, tuple, list), KEEP, strict=True), (tuple, keep_in_an_attribute)]
)
def test_data_that_is_held_in_many_places_is_read_once(kind, keep):
    counts = []
    for twice in (False, True):
        model = TwoGroups()
        keep(model, nest(kind, twice))
        counts.append(count_calls(model))
    assert counts[1] < 1.1 * counts[0]


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("kind", [list, dict])
def test_data_that_hold_themselves_are_no_obstacle(kind, keep):
    data = kind()
    data.append(data) if kind is list else data.update(own=data)
    model = TwoGroups()
    keep(model, data)
    supernet = convert(model, IMAGE)
    assert supernet.space.names == ("stem", "inner")
    supernet(IMAGE, supernet.space.min())
