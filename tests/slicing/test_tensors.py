"""The slice of one tensor: what it holds, what it shares, and where its gradient goes."""

import itertools

import pytest
import torch
from helpers.tied import HALF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices, extract_model
from timm_autoslim.slicing.tensors import (
    MAX_BLOCKS,
    NODE_TENSORS,
    add_slice,
    copy_slice,
    slice_for_call,
    take_slice,
)


def find_runs(mask):
    """Return the runs of an axis's True entries."""
    groups = itertools.groupby(range(len(mask)), key=lambda i: mask[i])
    blocks = [list(indexes) for value, indexes in groups if value]
    return tuple((block[0], len(block)) for block in blocks)


# -- taking and adding ------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any), st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_slice_holds_what_a_mask_selects_in_any_number_of_runs(rows, columns):
    tensor = torch.rand(len(rows), 5)
    axes = (find_runs(rows), find_runs(columns) if any(columns) else None)
    expected = tensor[torch.tensor(rows)]
    if any(columns):
        expected = expected[:, torch.tensor(columns)]
    assert torch.equal(take_slice(tensor, axes), expected)


@pytest.mark.parametrize("count", [MAX_BLOCKS, MAX_BLOCKS + 1])
def test_slices_of_very_many_runs_are_taken_and_added(count):
    starts = [i * (i + 3) // 2 for i in range(count)]  # no two gaps are alike
    axes = (tuple((start, 1) for start in starts), None)
    tensor = torch.rand(starts[-1] + 1, 2)
    slice_ = take_slice(tensor, axes)
    assert torch.equal(slice_, tensor[starts])
    total = torch.zeros_like(tensor)
    add_slice(total, slice_, axes)
    assert torch.equal(total[starts], tensor[starts])
    assert total.count_nonzero() == slice_.count_nonzero()


@pytest.mark.parametrize("runs", [((2, 3),), ((0, 1), (4, 2)), ((0, 1), (3, 1), (6, 1))])
def test_a_slice_is_contiguous_and_sends_its_gradient_back_to_its_entries(runs):
    tensor = torch.rand(4, 20, requires_grad=True)
    slice_ = take_slice(tensor, (None, runs))
    assert slice_.is_contiguous()
    assert slice_.shape == (4, sum(n for _, n in runs))
    slice_.sum().backward()
    expected = torch.zeros(20)
    for start, length in runs:
        expected[start : start + length] = 1
    assert torch.equal(tensor.grad, expected.expand(4, 20))


def test_the_slice_of_full_axes_is_the_tensor_itself():
    tensor = torch.rand(4, 5)
    assert take_slice(tensor, (None, None)) is tensor


def test_slices_of_channels_last_weights_are_channels_last():
    weight = torch.rand(8, 6, 3, 3).to(memory_format=torch.channels_last)
    slice_ = take_slice(weight, (HALF, ((1, 4),), None, None))
    assert slice_.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(slice_, weight[:3, 1:5])


# -- copies, and slices for a call ------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(None, None), (HALF, None), (HALF, HALF), (((0, 1), (4, 2)), None)])
def test_a_copied_slice_has_memory_of_its_own_and_stays_a_parameter(axes):
    parameter = nn.Parameter(torch.rand(6, 6), requires_grad=False)
    slice_ = copy_slice(parameter, axes)
    assert type(slice_) is nn.Parameter
    assert not slice_.requires_grad
    assert torch.equal(slice_, take_slice(parameter, axes))
    assert slice_.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
    assert slice_.untyped_storage().nbytes() == 4 * slice_.numel()
    buffer = copy_slice(parameter.detach(), axes)
    assert type(buffer) is torch.Tensor


def test_slices_for_a_call_follow_parameters_and_copy_buffers():
    parameter, frozen = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6), requires_grad=False)
    buffer, scalar = torch.rand(6), torch.tensor(3)
    tensors = [(parameter, (HALF,)), (frozen, (HALF,)), (buffer, (HALF,)), (scalar, ()), (parameter, (HALF,))]
    slices = slice_for_call(tensors)
    assert slices.keys() == {id(t) for t in (parameter, frozen, buffer, scalar)}
    assert [slices[id(t)].requires_grad for t in (parameter, frozen, buffer, scalar)] == [True, False, False, False]
    slices[id(buffer)].zero_()
    slices[id(scalar)].zero_()
    assert buffer.all()
    assert scalar == 3
    with torch.no_grad():  # torch's kernels look at this flag
        slice_ = slice_for_call(tensors)[id(parameter)]
    assert slice_.requires_grad
    assert torch.equal(slice_, parameter[:3])


# -- gradients --------------------------------------------------------------------------------------------------------

RUNS = [None, ((1, 3),), ((0, 2), (4, 2)), ((0, 1), (2, 3)), tuple((i * (i + 3) // 2, 1) for i in range(9))]


@pytest.mark.parametrize("second", RUNS)
@pytest.mark.parametrize("first", RUNS)
def test_backward_adds_to_the_entries_of_the_slice_and_to_no_other(first, second):
    torch.manual_seed(0)
    layer = nn.Linear(60, 60, bias=False)
    with torch.no_grad():
        layer.weight.grad = torch.rand(60, 60)
    before, slices = layer.weight.grad.clone(), Slices({"weight": (first, second)}, {})
    slice_ = replicate(layer, slices).weight
    factor = torch.rand_like(slice_)
    (slice_ * factor).sum().backward(retain_graph=True)
    expected = torch.zeros(60, 60)
    add_slice(expected, factor, (first, second))
    assert torch.equal(take_slice(expected, (first, second)), factor)
    assert expected.count_nonzero() == factor.count_nonzero()
    assert torch.equal(layer.weight.grad, before + expected)
    (gradient,) = torch.autograd.grad((slice_ * factor).sum(), layer.weight)  # returned, and so not added
    assert torch.equal(gradient, expected)
    assert torch.equal(layer.weight.grad, before + expected)


class Row(nn.Module):
    """More parameters than one node of the graph takes, each with one use that a call may leave out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(NODE_TENSORS + 2))

    def forward(self, x, skip=()):
        for i, layer in enumerate(self.layers):
            if i not in skip:
                x = layer(x)
        return x


ROW = Slices(
    {
        f"layers.{i}.{leaf}": (HALF,) * dims
        for i in range(NODE_TENSORS + 2)
        for leaf, dims in (("weight", 2), ("bias", 1))
    },
    {},
)


@pytest.mark.parametrize("skip", [(), (0, 3, NODE_TENSORS)])
def test_parameters_that_share_a_node_have_separate_gradients(skip):
    torch.manual_seed(0)
    row = Row()
    row.layers[1].weight.requires_grad_(False)
    shapes = []
    row.layers[2].weight.register_hook(lambda value: shapes.append(value.shape))
    row.layers[5].bias.grad = torch.ones(4)
    extracted, inputs = extract_model(row, ROW), torch.rand(2, 3)
    extracted(inputs, skip).square().sum().backward()
    replicate(row, ROW)(inputs, skip).square().sum().backward()
    assert shapes == [(4, 4)]
    for (name, parameter), slice_ in zip(row.named_parameters(), extracted.parameters(), strict=True):
        if slice_.grad is None:
            assert parameter.grad is None
        else:
            expected = torch.ones_like(parameter) if name == "layers.5.bias" else torch.zeros_like(parameter)
            add_slice(expected, slice_.grad, ROW.tensors[name])
            assert torch.equal(parameter.grad, expected), name


def test_a_few_of_the_parameters_that_share_a_node_may_be_asked_for():
    row = Row()
    weight = row.layers[3].weight
    replicate(row, ROW)(torch.rand(2, 3)).square().sum().backward(inputs=[weight])
    assert [name for name, parameter in row.named_parameters() if parameter.grad is not None] == ["layers.3.weight"]
    assert weight.grad.count_nonzero() == weight.grad[:3, :3].count_nonzero() > 0


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_parameter_get_the_full_gradient(register):
    layer, shapes = nn.Linear(4, 4, bias=False), []
    getattr(layer.weight, register)(lambda value: shapes.append(value.shape))
    replicate(layer, Slices({"weight": (HALF, HALF)}, {})).weight.sum().backward()
    assert shapes == [(4, 4)]
    assert layer.weight.grad.sum() == 9


def test_gradients_of_gradients_reach_the_full_parameters():
    layer = nn.Linear(4, 4, bias=False).double()
    out = (replicate(layer, Slices({"weight": (HALF, HALF)}, {})).weight ** 3).sum()
    (first,) = torch.autograd.grad(out, layer.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), layer.weight)
    expected = torch.zeros(4, 4, dtype=torch.double)
    expected[:3, :3] = 6 * layer.weight.detach()[:3, :3]
    torch.testing.assert_close(second, expected)


def test_backward_to_other_inputs_leaves_the_parameter_alone():
    layer, inputs = nn.Linear(4, 4, bias=False), torch.rand(2, 3, requires_grad=True)
    replicate(layer, Slices({"weight": (HALF, HALF)}, {}))(inputs).sum().backward(inputs=[inputs])
    assert inputs.grad.any()
    assert layer.weight.grad is None
