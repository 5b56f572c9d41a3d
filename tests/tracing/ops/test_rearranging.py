"""Operators that put tensors together or move elements: by name as by position."""

import pytest
from helpers.operators import aten, by_name, reasons, run_rule, tensor

CASES = {
    "cat": (aten.cat.default, [tensor(2, 6), tensor(2, 3)], 1),
    "cat with a part of one": (aten.cat.default, [tensor(2, 6), tensor(2, 1)], -1),
    "block_diag": (aten.block_diag.default, [tensor(2, 6), tensor(3)]),
    "stack": (aten.stack.default, [tensor(2, 6), tensor(2, 6)], -1),
    "constant_pad_nd": (aten.constant_pad_nd.default, tensor(2, 6), [1, 2], 0.0),
    "constant_pad_nd that crops": (aten.constant_pad_nd.default, tensor(2, 6), [-1, 2]),
    "reflection_pad1d": (aten.reflection_pad1d.default, tensor(2, 6), [1, 2]),
    "repeat": (aten.repeat.default, tensor(6, 5), [2, 1, 3]),
    "flip": (aten.flip.default, tensor(2, 6), [1]),
    "roll": (aten.roll.default, tensor(2, 6), [1], [1]),
    "im2col": (aten.im2col.default, tensor(2, 6, 4, 4), [2, 2], [1, 1], [0, 0], [2, 2]),
    "col2im": (aten.col2im.default, tensor(2, 24, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]),
    "pixel_shuffle": (aten.pixel_shuffle.default, tensor(2, 12, 4, 4), 2),
    "pixel_unshuffle": (aten.pixel_unshuffle.default, tensor(2, 3, 4, 4), 2),
    "channel_shuffle": (aten.channel_shuffle.default, tensor(2, 6, 4, 4), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_names_and_positions_give_the_same_labels(name):
    assert run_rule(*CASES[name]) == run_rule(*CASES[name], passing=by_name)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ((aten.cat.default, [tensor(6, 2), tensor(3, 2)]), (aten.cat.default, [tensor(6, 2), tensor(3, 2)], 0)),
        ((aten.stack.default, [tensor(6, 2)] * 2), (aten.stack.default, [tensor(6, 2)] * 2, 0)),
        ((aten.constant_pad_nd.default, tensor(2, 6), [1, 2]), CASES["constant_pad_nd"]),
        ((aten.roll.default, tensor(2, 6), [1]), (aten.roll.default, tensor(2, 6), [1, 1], [0, 1])),
    ],
    ids=["cat", "stack", "pad", "roll"],
)
def test_defaults_are_those_of_the_schema(short, full):
    assert run_rule(*short) == run_rule(*full)


def test_parts_are_put_one_after_another():
    outcome = run_rule(*CASES["cat"])
    a, b = outcome["inputs"]
    assert outcome["outputs"] == [[a[0], a[1] + b[1]]]
    assert a[0] == b[0]
    outcome = run_rule(*CASES["cat with a part of one"])
    assert outcome["outputs"][0][1][:6] == outcome["inputs"][0][1]
    assert reasons(outcome) == {"cat includes a part that cannot shrink"}


def test_a_stack_joins_its_parts():
    outcome = run_rule(*CASES["stack"])
    a, b = outcome["inputs"]
    assert a == b
    assert outcome["outputs"] == [[*a, None]]


@pytest.mark.parametrize("name", ["constant_pad_nd", "reflection_pad1d"])
def test_a_pad_adds_channels_that_stay(name):
    outcome = run_rule(*CASES[name])
    x, out = outcome["inputs"][0], outcome["outputs"][0]
    assert out[0] == x[0]
    assert out[1][1:-2] == x[1]
    assert [vector for vector, _ in outcome["frozen_vectors"]] == [out[1][:1], out[1][-2:]]
    outcome = run_rule(*CASES["constant_pad_nd that crops"])
    assert outcome["outputs"][0][1] is None
    assert reasons(outcome) == {"pad crops these channels"}


def test_a_repeat_repeats_labels():
    outcome = run_rule(*CASES["repeat"])
    x = outcome["inputs"][0]
    assert outcome["outputs"] == [[None, x[0], x[1] * 3]]


def test_elements_take_their_labels_with_them():
    outcome = run_rule(*CASES["flip"])
    x = outcome["inputs"][0]
    assert outcome["outputs"] == [[x[0], x[1][::-1]]]
    assert reasons(run_rule(*CASES["roll"])) == {"roll moves channels by a fixed distance"}


@pytest.mark.parametrize("name", ["im2col", "pixel_unshuffle"])
def test_each_channel_fills_a_block(name):
    outcome = run_rule(*CASES[name])
    channels, blocks = outcome["inputs"][0][1], outcome["outputs"][0][1]
    assert blocks == [channel for channel in channels for _ in range(4)]


@pytest.mark.parametrize("name", ["col2im", "pixel_shuffle"])
def test_each_block_becomes_a_channel(name):
    outcome = run_rule(*CASES[name])
    blocks, channels = outcome["inputs"][0][1], outcome["outputs"][0][1]
    assert blocks == [channel for channel in channels for _ in range(4)]
    assert len(set(channels)) == len(channels)


def test_a_channel_shuffle_with_a_literal_number_of_groups_is_told():
    outcome = run_rule(*CASES["channel_shuffle"], function="channel_shuffle")
    label = outcome["inputs"][0][1]
    assert label[:3] == label[3:]
    assert outcome["outputs"][0][1] == [channel for channel in label[:3] for _ in range(2)]
