"""The one slicing code: what is kept, for the length of a block or for good."""

import copy

import numpy as np
import pytest
import torch
from helpers.zoo import Plain, assert_same, randomise, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_autoslim.slicing.attributes import restore_attributes, set_attributes
from timm_autoslim.slicing.slices import Slices, apply_slices, extract_model, shrink_model
from timm_autoslim.slicing.tensors import NODE_TENSORS, add_slice, take_slice
from timm_autoslim.tracing.graph import runs_of


class Tied(nn.Module):
    """Two linear layers that share a weight, a plain tensor attribute, and integers in every kind of container."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale = torch.rand(6)
        self.width, self.shape, self.parts = 6, (6, 2), [6, 6]
        self.info = [{"num_chs": 6, "sizes": (1, 6)}]

    def forward(self, x):
        return self.second(self.first(x) * self.scale)


HALF = ((0, 3),)
TIED = Slices(
    {
        "first.weight": (HALF, HALF),
        "second.weight": (HALF, HALF),
        "first.bias": (HALF,),
        "second.bias": (HALF,),
        "scale": (HALF,),
    },
    {"width": 3, "shape.0": 3, "parts.1": 3, "info.0.num_chs": 3, "info.0.sizes.1": 3, "first.in_features": 3},
)
AFTER = {"width": 3, "shape": (3, 2), "parts": [6, 3], "info": [{"num_chs": 3, "sizes": (1, 3)}]}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any), st.lists(st.booleans(), min_size=5, max_size=5))
def test_take_keeps_what_a_mask_keeps_and_in_any_number_of_runs(rows, columns):
    tensor = torch.rand(len(rows), 5)
    axes = (runs_of(np.array(rows)), runs_of(np.array(columns)) if any(columns) else None)
    expected = tensor[torch.tensor(rows)]
    if any(columns):
        expected = expected[:, torch.tensor(columns)]
    assert torch.equal(take_slice(tensor, axes), expected)


@pytest.mark.parametrize("runs", [((2, 3),), ((0, 1), (4, 2)), ((0, 1), (3, 1), (6, 1))])
def test_take_is_contiguous_and_sends_gradients_back_to_the_kept_places(runs):
    tensor = torch.rand(4, 20, requires_grad=True)
    piece = take_slice(tensor, (None, runs))
    assert piece.is_contiguous()
    assert piece.shape == (4, sum(n for _, n in runs))
    piece.sum().backward()
    kept = torch.zeros(20)
    for start, length in runs:
        kept[start : start + length] = 1
    assert torch.equal(tensor.grad, kept.expand(4, 20))


def test_take_of_everything_is_the_tensor_itself():
    tensor = torch.rand(4, 5)
    assert take_slice(tensor, (None, None)) is tensor


def test_attributes_are_set_in_modules_lists_tuples_and_dicts():
    model = nn.Sequential(Tied())
    before = snapshot(model)
    changed = set_attributes(model, {f"0.{path}": value for path, value in TIED.attributes.items()})
    assert {name: vars(model[0])[name] for name in AFTER} == AFTER
    assert model[0].first.in_features == 3
    restore_attributes(changed)
    assert_same(before, snapshot(model))
    assert model[0].shape == (6, 2)
    assert model[0].info == [{"num_chs": 6, "sizes": (1, 6)}]


def test_a_list_that_a_configuration_shares_stays_as_it_is():
    model, config = nn.Linear(2, 2), [192, 384]
    model.embed_dim = config
    changed = set_attributes(model, {"embed_dim.1": 100, "embed_dim.0": 50})
    assert model.embed_dim == [50, 100]
    assert config == [192, 384]
    restore_attributes(changed)
    assert model.embed_dim is config


def test_members_of_one_tuple_are_set_one_after_the_other():
    model = Tied()
    changed = set_attributes(model, {"shape.0": 3, "shape.1": 1, "info.0.sizes.0": 4, "info.0.sizes.1": 5})
    assert (model.shape, model.info[0]["sizes"]) == ((3, 1), (4, 5))
    restore_attributes(changed)
    assert (model.shape, model.info[0]["sizes"]) == ((6, 2), (1, 6))


@pytest.mark.parametrize(("path", "error"), [("height", KeyError), ("shape.2", IndexError), ("parts.2", IndexError)])
def test_an_attribute_that_is_not_there_is_not_made_up_and_the_others_stay(path, error):
    model = Tied()
    before = snapshot(model)
    with pytest.raises(error):
        set_attributes(model, {"width": 3, "shape.0": 3, path: 3})
    assert_same(before, snapshot(model))
    assert "height" not in vars(model)


def test_a_block_slices_and_puts_everything_back():
    model = Tied()
    before = snapshot(model)
    x = torch.rand(2, 3)
    with apply_slices(model, TIED):
        assert model.first.weight.shape == (3, 3)
        assert model.second.weight is model.first.weight
        assert {name: vars(model)[name] for name in AFTER} == AFTER
        inside = model(x)
    assert_same(before, snapshot(model))
    assert torch.equal(inside, extract_model(model, TIED)(x))


def test_a_block_puts_everything_back_when_its_body_raises():
    model = Tied()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), apply_slices(model, TIED):
        raise ZeroDivisionError
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("slices", "error"),
    [
        (Slices({**TIED.tensors, "third.weight": (HALF,)}, {}), KeyError),
        (Slices({**TIED.tensors, "first.gain": (HALF,)}, {}), KeyError),
        (Slices({**TIED.tensors, "scale": (((0, 7),),)}, {}), RuntimeError),
        (Slices(TIED.tensors, {"width": 3, "height": 3}), KeyError),
    ],
)
def test_slices_that_do_not_fit_leave_nothing_half_done(slices, error):
    model = Tied()
    before = snapshot(model)
    with pytest.raises(error), apply_slices(model, slices):
        pytest.fail("the block must not be entered")
    assert_same(before, snapshot(model))
    with pytest.raises(error):
        extract_model(model, slices)
    assert_same(before, snapshot(model))


def test_gradients_of_a_block_reach_the_whole_parameters():
    model = Tied()
    with apply_slices(model, TIED):
        model(torch.rand(2, 3)).sum().backward()
    assert model.first.weight.grad.shape == (6, 6)
    assert model.first.weight.grad[:3, :3].count_nonzero() == 9
    assert model.first.weight.grad.count_nonzero() == 9
    assert model.first.bias.grad[3:].tolist() == [0, 0, 0]


def test_buffers_of_a_block_are_copies():
    model = randomise(Plain()).train()
    slices = Slices({"bn.running_mean": (None,), "bn.running_var": (None,), "bn.num_batches_tracked": ()}, {})
    before = snapshot(model)
    with apply_slices(model, slices):
        model.bn(torch.rand(2, 8, 4, 4))
        assert not torch.equal(model.bn.running_mean, before[0]["bn.running_mean"])
        assert model.bn.num_batches_tracked == 8
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("cut", [extract_model, lambda model, slices: shrink_model(model, slices) or model])
def test_what_is_cut_for_good_has_weights_of_its_own_and_keeps_ties_and_kinds(cut):
    model = Tied()
    model.second.bias.requires_grad_(False)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    plain = cut(model, TIED)
    assert type(plain) is Tied
    assert plain.second.weight is plain.first.weight
    assert type(plain.first.weight) is nn.Parameter
    assert [p.requires_grad for p in (plain.first.bias, plain.second.bias)] == [True, False]
    assert not storages & {p.untyped_storage().data_ptr() for p in plain.parameters()}
    assert plain.first.weight.untyped_storage().nbytes() == 9 * 4
    assert torch.equal(plain.first.weight, whole["first.weight"][:3, :3])
    assert {name: vars(plain)[name] for name in AFTER} == AFTER


def test_cutting_for_good_in_place_and_in_a_copy_agree():
    model = randomise(Plain()).eval()
    slices = Slices(
        {"inner.weight": (((0, 5),), None, None, None), "outer.weight": (None, ((0, 5),), None, None)}
        | {f"bn_inner.{leaf}": (((0, 5),),) for leaf in ("weight", "bias", "running_mean", "running_var")},
        {"inner.out_channels": 5, "outer.in_channels": 5, "bn_inner.num_features": 5},
    )
    plain, shrunk = extract_model(model, slices), copy.deepcopy(model)
    shrink_model(shrunk, slices)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(plain(x), shrunk(x))
    assert str(plain) == str(shrunk)
    assert plain.state_dict().keys() == shrunk.state_dict().keys() == model.state_dict().keys()
    with apply_slices(model, slices):
        assert torch.equal(model(x), plain(x))


def test_recurrent_layers_hold_their_own_weights_only():
    model = nn.Sequential(nn.LSTM(6, 8))  # of 4 gates
    gates = tuple((8 * gate, 3) for gate in range(4))
    sizes = {
        "weight_ih_l0": (gates, None),
        "weight_hh_l0": (gates, ((0, 3),)),
        "bias_ih_l0": (gates,),
        "bias_hh_l0": (gates,),
    }
    slices = Slices({f"0.{name}": axes for name, axes in sizes.items()}, {"0.hidden_size": 3})
    plain, x = extract_model(model, slices), torch.rand(5, 2, 6)
    shrink_model(model, slices)
    assert all(a is b for a, b in zip(model[0]._flat_weights, model.parameters(), strict=True))
    assert torch.equal(torch.jit.script(model)(x)[0], plain(x)[0])  # scripted before it ever ran


def test_extracting_makes_no_full_copy_of_what_is_cut(monkeypatch):
    model = Tied()
    copied = []
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self.shape) or self)
    extract_model(model, TIED)
    assert copied == []


# --------------------------------------------------------------------------------- gradients of a subnet's parameters

RUNS = [None, ((1, 3),), ((0, 2), (4, 2)), ((0, 1), (2, 3)), tuple((i * (i + 3) // 2, 1) for i in range(9))]


@pytest.mark.parametrize("second", RUNS)
@pytest.mark.parametrize("first", RUNS)
def test_backward_adds_to_the_kept_places_and_to_no_other(first, second):
    torch.manual_seed(0)
    layer = nn.Linear(60, 60, bias=False)
    with torch.no_grad():
        layer.weight.grad = torch.rand(60, 60)
    before, slices = layer.weight.grad.clone(), Slices({"weight": (first, second)}, {})
    with apply_slices(layer, slices):
        factor = torch.rand_like(layer.weight)
        (layer.weight * factor).sum().backward(retain_graph=True)
        own = layer.weight
    kept = torch.zeros(60, 60)
    add_slice(kept, factor, (first, second))
    assert torch.equal(take_slice(kept, (first, second)), factor)
    assert kept.count_nonzero() == factor.count_nonzero()
    assert torch.equal(layer.weight.grad, before + kept)
    (wanted,) = torch.autograd.grad((own * factor).sum(), layer.weight)  # asked for, so handed over and not added
    assert torch.equal(wanted, kept)
    assert torch.equal(layer.weight.grad, before + kept)


class Row(nn.Module):
    """More parameters than one node of the graph takes, each with one use that a call may leave out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(NODE_TENSORS + 2))

    def forward(self, x, skipped=()):
        for i, layer in enumerate(self.layers):
            if i not in skipped:
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


@pytest.mark.parametrize("skipped", [(), (0, 3, NODE_TENSORS)])
def test_parameters_that_share_a_node_have_their_own_gradients(skipped):
    torch.manual_seed(0)
    row = Row()
    row.layers[1].weight.requires_grad_(False)
    seen = []
    row.layers[2].weight.register_hook(lambda value: seen.append(value.shape))
    row.layers[5].bias.grad = torch.ones(4)
    plain, inputs = extract_model(row, ROW), torch.rand(2, 3)
    plain(inputs, skipped).square().sum().backward()
    with apply_slices(row, ROW):
        row(inputs, skipped).square().sum().backward()
    assert seen == [(4, 4)]
    for (name, whole), piece in zip(row.named_parameters(), plain.parameters(), strict=True):
        if piece.grad is None:
            assert whole.grad is None
        else:
            given = torch.ones_like(whole) if name == "layers.5.bias" else torch.zeros_like(whole)
            add_slice(given, piece.grad, ROW.tensors[name])
            assert torch.equal(whole.grad, given), name


def test_a_part_of_the_parameters_that_share_a_node_may_be_asked_for():
    row = Row()
    wanted = row.layers[3].weight
    with apply_slices(row, ROW):
        row(torch.rand(2, 3)).square().sum().backward(inputs=[wanted])
    assert [name for name, parameter in row.named_parameters() if parameter.grad is not None] == ["layers.3.weight"]
    assert wanted.grad.count_nonzero() == wanted.grad[:3, :3].count_nonzero() > 0


def test_hooks_of_a_parameter_see_the_whole_gradient():
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        layer, seen = nn.Linear(4, 4, bias=False), []
        getattr(layer.weight, register)(lambda value, seen=seen: seen.append(value.shape))
        with apply_slices(layer, Slices({"weight": (HALF, HALF)}, {})):
            layer.weight.sum().backward()
        assert seen == [(4, 4)]
        assert layer.weight.grad.sum() == 9


def test_gradients_of_gradients_reach_the_whole_parameters():
    layer = nn.Linear(4, 4, bias=False).double()
    with apply_slices(layer, Slices({"weight": (HALF, HALF)}, {})):
        out = (layer.weight**3).sum()
    (first,) = torch.autograd.grad(out, layer.weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), layer.weight)
    expected = torch.zeros(4, 4, dtype=torch.double)
    expected[:3, :3] = 6 * layer.weight.detach()[:3, :3]
    torch.testing.assert_close(second, expected)


def test_backward_to_other_inputs_leaves_the_parameter_alone():
    layer, inputs = nn.Linear(4, 4, bias=False), torch.rand(2, 3, requires_grad=True)
    with apply_slices(layer, Slices({"weight": (HALF, HALF)}, {})):
        layer(inputs).sum().backward(inputs=[inputs])
    assert inputs.grad.any()
    assert layer.weight.grad is None


def test_slices_of_channels_last_weights_are_channels_last():
    weight = torch.rand(8, 6, 3, 3).to(memory_format=torch.channels_last)
    piece = take_slice(weight, (HALF, ((1, 4),), None, None))
    assert piece.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(piece, weight[:3, 1:5])
