"""Matrix products and convolutions: the contracted channels are joined, by name as by position."""

import pytest
from helpers.operators import aten, by_name, reasons, run_rule, tensor

CASES = {
    "mm": (aten.mm.default, tensor(2, 6), tensor(6, 8)),
    "addmm": (aten.addmm.default, tensor(8), tensor(2, 6), tensor(6, 8)),
    "addmm with a scale": (aten.addmm.default, tensor(8), tensor(2, 6), tensor(6, 8), 0.5, 2.0),
    "bmm": (aten.bmm.default, tensor(3, 2, 6), tensor(3, 6, 8)),
    "baddbmm": (aten.baddbmm.default, tensor(3, 2, 8), tensor(3, 2, 6), tensor(3, 6, 8)),
    "mv": (aten.mv.default, tensor(5, 6), tensor(6)),
    "dot": (aten.dot.default, tensor(6), tensor(6)),
    "bilinear": (
        aten._trilinear.default, tensor(2, 6), tensor(8, 6, 5), tensor(2, 5), [1, 3], [0], [1, 2], [2, 3],
    ),
    "distance": (aten._cdist_forward.default, tensor(2, 6), tensor(8, 6), 2.0, None),
    "convolution": (
        aten.convolution.default, tensor(2, 6, 5, 5), tensor(8, 6, 3, 3), tensor(8), [1, 1], [1, 1], [1, 1], False,
        [0, 0], 1,
    ),
    "convolution without a bias": (
        aten.convolution.default, tensor(2, 6, 5, 5), tensor(8, 6, 1, 1), None, [1, 1], [0, 0], [1, 1], False,
        [0, 0], 1,
    ),
    "grouped": (
        aten.convolution.default, tensor(2, 6, 5, 5), tensor(12, 2, 3, 3), tensor(12), [2, 2], [1, 1], [1, 1], False,
        [0, 0], 3,
    ),
    "depthwise": (
        aten.convolution.default, tensor(2, 6, 5, 5), tensor(6, 1, 3, 3), tensor(6), [1, 1], [1, 1], [1, 1], False,
        [0, 0], 6,
    ),
    "transposed": (
        aten.convolution.default, tensor(2, 6, 5, 5), tensor(6, 8, 3, 3), tensor(8), [2, 2], [1, 1], [1, 1], True,
        [1, 1], 1,
    ),
    "transposed and grouped": (
        aten.convolution.default, tensor(2, 6, 5, 5), tensor(6, 4, 3, 3), tensor(8), [2, 2], [1, 1], [1, 1], True,
        [1, 1], 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_names_and_positions_give_the_same_labels(name):
    assert run_rule(*CASES[name]) == run_rule(*CASES[name], passing=by_name)


@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "baddbmm"])
def test_a_product_joins_what_it_runs_along(name):
    outcome = run_rule(*CASES[name])
    *bias, a, b = outcome["inputs"]
    (out,) = outcome["outputs"]
    assert a[-1] == b[-2]
    assert out[-2:] == [a[-2], b[-1]]
    assert all(label[-1] == out[-1] for label in bias)


def test_a_bilinear_product_joins_both_inputs_with_the_weight():
    outcome = run_rule(*CASES["bilinear"])
    x, weight, y = outcome["inputs"]
    (out,) = outcome["outputs"]
    assert (weight[1], weight[2]) == (x[1], y[1])
    assert out[0] == x[0] == y[0]
    assert out[1] == weight[0]
    assert outcome["contractions"] == [(1, [x[0], weight[0], x[1], y[1]])]


def test_a_distance_joins_what_it_sums_over():
    outcome = run_rule(*CASES["distance"])
    x, y = outcome["inputs"]
    assert x[1] == y[1]
    assert outcome["outputs"] == [[x[0], y[0]]]
    assert outcome["contractions"] == [(1, [x[0], y[0], x[1]])]


def test_a_convolution_joins_input_weight_and_bias():
    outcome = run_rule(*CASES["convolution"])
    x, weight, bias = outcome["inputs"]
    (out,) = outcome["outputs"]
    assert weight[1] == x[1]
    assert out[1] == weight[0] == bias[0]
    assert outcome["producers"] == [("layer", weight[0])]


def test_a_grouped_convolution_takes_a_share_of_each_group_or_loses_groups():
    x, weight, bias = run_rule(*CASES["grouped"])["inputs"]
    assert x[1][:2] == x[1][2:4] == x[1][4:] == weight[1]
    assert weight[0][:4] == weight[0][4:8] == weight[0][8:] == bias[0][:4]
    outcome = run_rule(*CASES["depthwise"])
    x, weight, _ = outcome["inputs"]
    assert x[1] == weight[0]
    assert len(set(x[1])) == 6
    assert "the code passes the constant 6 to a_function" in reasons(outcome)


def test_along_a_kernel_channels_survive_only_if_it_gives_one_for_each():
    same = run_rule(*CASES["convolution"])
    assert same["outputs"][0][2:] == same["inputs"][0][2:]
    assert same["ordered_vectors"] == same["inputs"][0][2:]
    strided = run_rule(*CASES["grouped"])
    assert strided["outputs"][0][2:] == [None, None]
    assert "a convolution treats this dimension as positions, not channels" in reasons(strided)
