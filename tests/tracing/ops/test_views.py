"""Views: the labels follow the data, by name as by position."""

import pytest
import torch
from helpers.models import randomise
from helpers.operators import aten, by_name, reasons, run_rule, tensor
from torch import nn

from timm_autoslim import convert

CASES = {
    "view": (aten.view.default, tensor(2, 12, 5), [2, 3, 4, 5]),
    "_unsafe_view": (aten._unsafe_view.default, tensor(2, 12, 5), [24, 5]),
    "reshape": (aten.reshape.default, tensor(2, 12, 5), [2, 60]),
    "permute": (aten.permute.default, tensor(2, 6, 5), [2, 0, 1]),
    "transpose": (aten.transpose.int, tensor(2, 6, 5), 1, 2),
    "t": (aten.t.default, tensor(6, 5)),
    "squeeze": (aten.squeeze.dim, tensor(2, 1, 5), 1),
    "unsqueeze": (aten.unsqueeze.default, tensor(2, 6), 1),
    "expand": (aten.expand.default, tensor(2, 1, 5), [2, 6, 5]),
    "as_strided": (aten.as_strided.default, tensor(2, 6), [2, 6], [6, 1]),
    "as_strided to another shape": (aten.as_strided.default, tensor(2, 6), [2, 3], [6, 1], 0),
    "view_as_complex": (aten.view_as_complex.default, tensor(6, 5, 2)),
    "view_as_real": (aten.view_as_real.default, torch.empty(6, 5, dtype=torch.complex64, device="meta")),
}


@pytest.mark.parametrize("name", CASES)
def test_names_and_positions_give_the_same_labels(name):
    assert run_rule(*CASES[name]) == run_rule(*CASES[name], passing=by_name)


def test_defaults_are_those_of_the_schema():
    full = (aten.as_strided.default, tensor(2, 6), [2, 6], [6, 1], None)
    assert run_rule(*CASES["as_strided"]) == run_rule(*full)


def test_dimensions_move_with_their_labels():
    for name, order in {"permute": (2, 0, 1), "transpose": (0, 2, 1), "t": (1, 0)}.items():
        outcome = run_rule(*CASES[name])
        assert outcome["outputs"] == [[outcome["inputs"][0][d] for d in order]]


def test_dimensions_of_length_one_come_and_go():
    outcome = run_rule(*CASES["squeeze"])
    assert outcome["outputs"] == [[outcome["inputs"][0][0], outcome["inputs"][0][2]]]
    outcome = run_rule(*CASES["unsqueeze"])
    assert outcome["outputs"] == [[outcome["inputs"][0][0], None, outcome["inputs"][0][1]]]


def test_only_what_is_large_survives_a_merge():
    outcome = run_rule(*CASES["_unsafe_view"], function="matmul")
    x, (merged, last) = outcome["inputs"][0], outcome["outputs"][0]
    assert merged == x[1] * 2
    assert last == x[2]
    assert reasons(outcome) == {"matmul merges these channels with another channel dimension, and only one can shrink"}


def test_what_a_stride_skips_is_not_followed():
    outcome = run_rule(*CASES["as_strided to another shape"])
    assert outcome["outputs"] == [[None, None]]
    assert reasons(outcome) == {"the operator as_strided to another shape has no rule"}


def test_the_bytes_of_another_type_are_not_followed():
    outcome = run_rule(aten.view.dtype, tensor(2, 6), torch.int32)
    assert outcome["outputs"] == [[None, None]]
    assert reasons(outcome) == {"view reads the bytes as another type"}


def test_pairs_of_a_complex_number_stay():
    outcome = run_rule(*CASES["view_as_complex"])
    assert outcome["outputs"] == [outcome["inputs"][0][:2]]
    assert reasons(outcome) == {"view_as_complex reads this dimension as real and imaginary parts"}
    outcome = run_rule(*CASES["view_as_real"])
    assert outcome["outputs"] == [[*outcome["inputs"][0], None]]


class Reshaped(nn.Module):
    """Two layers, and between them a function of two tensors."""

    def __init__(self, body):
        super().__init__()
        self.stem, self.head, self.body = nn.Linear(6, 8), nn.Linear(8, 5), body

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


BODIES = {
    "view_as": (
        lambda x: x.flatten().view_as(x) + x.view_as(x),
        lambda x: x.flatten().view_as(other=x) + x.view_as(other=x),
    ),
    "expand_as": (
        lambda x: x.mean(0, keepdim=True).expand_as(x) + x,
        lambda x: x.mean(0, keepdim=True).expand_as(other=x) + x,
    ),
    "unflatten": (
        lambda x: x.unflatten(1, (x.shape[1], 1)).flatten(1),
        lambda x: x.unflatten(dim=1, sizes=(x.shape[1], 1)).flatten(start_dim=1),
    ),
    "expand": (
        lambda x: x[:, None].expand(-1, 3, x.shape[1]).sum(1),
        lambda x: x[:, None].expand(size=(-1, 3, x.shape[1])).sum(1),
    ),
    "view": (
        lambda x: x.view(x.shape[0], 1, x.shape[1]).mean(1),
        lambda x: x.view(size=(x.shape[0], 1, x.shape[1])).mean(1),
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_the_model_s_code_may_name_arguments_too(name):
    supernets = [convert(randomise(Reshaped(body)).eval(), torch.zeros(2, 6)) for body in BODIES[name]]
    assert supernets[0].space.max().to_dict() == supernets[1].space.max().to_dict() == {"stem": 8}
    assert supernets[0].graph.fixed == supernets[1].graph.fixed
