"""Elementwise operators and factories, by name as by position."""

import pytest
import torch
from helpers.operators import aten, by_name, run_rule, tensor

X = (2, 6, 5)
CASES = {
    "add": (aten.add.Tensor, tensor(*X), tensor(*X), 2),
    "add of a broadcast": (aten.add.Tensor, tensor(*X), tensor(6, 1)),
    "add in place": (aten.add_.Tensor, tensor(*X), tensor(6, 1), 2),
    "where": (aten.where.self, tensor(6, 1).bool(), tensor(*X), tensor(*X)),
    "addcmul": (aten.addcmul.default, tensor(*X), tensor(*X), tensor(*X), 0.5),
    "clamp": (aten.clamp.Tensor, tensor(*X), tensor(6, 1), tensor(6, 1)),
    "masked_fill": (aten.masked_fill.Scalar, tensor(*X), tensor(*X).bool(), 0),
    "copy_": (aten.copy_.default, tensor(*X), tensor(6, 5)),
    "_softmax": (aten._softmax.default, tensor(*X), 1, False),
    "zeros_like": (aten.zeros_like.default, tensor(*X)),
    "glu": (aten.glu.default, tensor(*X), 1),
    "_weight_norm_interface": (aten._weight_norm_interface.default, tensor(8, 6, 3), tensor(8, 1, 1), 0),
    "new_zeros": (aten.new_zeros.default, tensor(*X), [2, 6]),
    "arange": (aten.arange.default, 6),
}


@pytest.mark.parametrize("name", CASES)
def test_names_and_positions_give_the_same_labels(name):
    assert run_rule(*CASES[name]) == run_rule(*CASES[name], passing=by_name)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ((aten.glu.default, tensor(2, 6)), (aten.glu.default, tensor(2, 6), -1)),
        ((aten.add.Tensor, tensor(2, 6), tensor(6)), (aten.add.Tensor, tensor(2, 6), tensor(6), 1)),
        (
            (aten._weight_norm_interface.default, tensor(8, 6), tensor(8, 1)),
            (aten._weight_norm_interface.default, tensor(8, 6), tensor(8, 1), 0),
        ),
    ],
    ids=["glu", "add", "weight norm"],
)
def test_defaults_are_those_of_the_schema(short, full):
    assert run_rule(*short) == run_rule(*full)


def test_inputs_are_joined_under_broadcasting():
    outcome = run_rule(*CASES["add of a broadcast"])
    x, other = outcome["inputs"]
    assert other == [x[1], None]
    assert outcome["outputs"] == [x]


def test_in_place_the_target_has_the_result():
    outcome = run_rule(*CASES["add in place"])
    x, other = outcome["inputs"]
    assert outcome["outputs"] == [x]
    assert other == [x[1], None]


def test_the_halves_of_a_gate_go_together():
    outcome = run_rule(*CASES["glu"])
    (label,) = [labels[1] for labels in outcome["inputs"]]
    assert label[:3] == label[3:] == outcome["outputs"][0][1]


@pytest.mark.parametrize("passing", [lambda op, *v: (v, {}), by_name], ids=["by position", "by name"])
def test_a_tensor_that_torch_makes_inside_a_function_is_like_the_input(passing):
    x = tensor(2, 6)
    outcome = run_rule(aten.new_zeros.default, x, [2, 6], passing=passing, function="a_function")
    assert outcome["outputs"] == outcome["inputs"]
    outcome = run_rule(aten.new_zeros.default, x, [2, 6], passing=passing, function="new_zeros")
    assert outcome["outputs"] == [[None, None]]


def test_all_that_torch_has_in_place_has_a_rule():
    from timm_autoslim.tracing import ops

    for name in ("add", "relu", "clamp", "lerp", "hardswish"):
        assert ops.has_rule(f"aten.{name}_")
    assert not hasattr(torch.ops.aten, "where_")
    assert not ops.has_rule("aten.where_")
