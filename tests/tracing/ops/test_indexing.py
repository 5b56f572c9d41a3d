"""Slices, splits and indices: by name as by position."""

import pytest
import torch
from helpers.operators import aten, by_name, reasons, run_rule, tensor

INDEX = torch.zeros(3, dtype=torch.long, device="meta")
CASES = {
    "slice": (aten.slice.Tensor, tensor(2, 8, 5), 1, 2, 6, 1),
    "slice with a step": (aten.slice.Tensor, tensor(2, 8, 5), 1, 1, 8, 2),
    "slice from the end": (aten.slice.Tensor, tensor(2, 8, 5), 1, -3),
    "split": (aten.split.Tensor, tensor(2, 8), 4, 1),
    "split_with_sizes": (aten.split_with_sizes.default, tensor(2, 8), [2, 6], 1),
    "unbind": (aten.unbind.int, tensor(2, 3, 5), 1),
    "unfold": (aten.unfold.default, tensor(2, 8, 5), 1, 2, 2),
    "select": (aten.select.int, tensor(2, 8, 5), -2, 3),
    "index": (aten.index.Tensor, tensor(2, 8, 5), [None, INDEX]),
    "index of two, apart": (aten.index.Tensor, tensor(2, 8, 5), [INDEX, None, INDEX]),
    "index_select": (aten.index_select.default, tensor(2, 8, 5), 1, INDEX),
    "gather": (aten.gather.default, tensor(2, 8), 1, torch.zeros(2, 3, dtype=torch.long, device="meta")),
    "embedding": (aten.embedding.default, tensor(10, 8), INDEX, -1, False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_names_and_positions_give_the_same_labels(name):
    assert run_rule(*CASES[name]) == run_rule(*CASES[name], passing=by_name)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ((aten.slice.Tensor, tensor(8, 5)), (aten.slice.Tensor, tensor(8, 5), 0, None, None, 1)),
        ((aten.split.Tensor, tensor(8, 5), 4), (aten.split.Tensor, tensor(8, 5), 4, 0)),
        ((aten.unbind.int, tensor(3, 5)), (aten.unbind.int, tensor(3, 5), 0)),
        ((aten.embedding.default, tensor(10, 8), INDEX), CASES["embedding"]),
    ],
    ids=["slice", "split", "unbind", "embedding"],
)
def test_defaults_are_those_of_the_schema(short, full):
    assert run_rule(*short) == run_rule(*full)


def test_a_slice_has_the_labels_of_its_part():
    outcome = run_rule(*CASES["slice"])
    x = outcome["inputs"][0]
    assert outcome["outputs"] == [[x[0], x[1][2:6], x[2]]]


def test_a_slice_with_a_step_keeps_blocks_together():
    outcome = run_rule(*CASES["slice with a step"])
    label = outcome["inputs"][0][1]
    assert label[::2] == label[1::2] == outcome["outputs"][0][1]


def test_a_slice_that_counts_from_the_end_keeps_the_end():
    outcome = run_rule(*CASES["slice from the end"])
    assert "a slice counts channels from the end" in reasons(outcome)


def test_parts_of_a_split_have_the_labels_of_their_place():
    outcome = run_rule(*CASES["split_with_sizes"], function="split")
    x = outcome["inputs"][0]
    assert outcome["outputs"] == [[x[0], x[1][:2]], [x[0], x[1][2:]]]
    assert reasons(outcome) == {"the code passes the constant 2 to split", "the code passes the constant 6 to split"}


@pytest.mark.parametrize(("operator", "size"), [("split", 3), ("split_with_sizes", [3, 3, 2])])
def test_a_split_whose_last_part_is_shorter(operator, size):
    overload = {"split": aten.split.Tensor, "split_with_sizes": aten.split_with_sizes.default}[operator]
    outcome = run_rule(overload, tensor(5, 8), size, 1, function="split")
    assert [len(labels[1]) for labels in outcome["outputs"]] == [3, 3, 2]
    assert reasons(outcome) >= {"the code passes the constant 3 to split"}
    chunked = run_rule(overload, tensor(5, 8), size, 1, function="chunk")
    assert reasons(chunked) == {"chunk cuts these channels into unequal parts"}


def test_equal_parts_of_a_chunk_are_tied_by_count():
    outcome = run_rule(*CASES["split"], function="chunk")
    label = outcome["inputs"][0][1]
    assert outcome["count_ties"] == [[label[:4], label[4:]]]
    assert not outcome["frozen_vectors"]


def test_what_an_index_picks_from_stays():
    outcome = run_rule(*CASES["select"])
    x = outcome["inputs"][0]
    assert outcome["outputs"] == [[x[0], x[2]]]
    assert outcome["frozen_vectors"] == [(x[1], "layer: an index takes one of these channels")]
    outcome = run_rule(*CASES["unbind"])
    assert outcome["outputs"] == [[outcome["inputs"][0][0], outcome["inputs"][0][2]]] * 3


def test_new_dimensions_stand_where_numpy_puts_them():
    outcome = run_rule(*CASES["index"])
    x = outcome["inputs"][0]
    assert outcome["outputs"] == [[x[0], None, x[2]]]
    outcome = run_rule(*CASES["index of two, apart"])
    assert outcome["outputs"] == [[None, outcome["inputs"][0][1]]]


def test_an_embedding_has_the_columns_of_its_table():
    outcome = run_rule(*CASES["embedding"])
    table = outcome["inputs"][0]
    assert outcome["outputs"] == [[None, table[1]]]
    assert reasons(outcome) == {"an index takes some rows of this table"}
