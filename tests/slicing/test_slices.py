"""All slices of a model, in a copy or in place."""

import copy
import functools

import pytest
import torch
from helpers.models import TwoGroups, randomise
from helpers.tied import HALF, SLICED_ATTRIBUTES, TIED_SLICES, Tied
from torch import nn

import timm_autoslim
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import (
    Slices,
    clear_caches,
    compose_runs,
    extract_model,
    shrink_model,
)

# -- in a copy, and in place ------------------------------------------------------------------------------------------


def shrink(model, slices):
    shrink_model(model, slices)
    return model


@pytest.mark.parametrize("cut", [extract_model, shrink])
def test_the_result_has_weights_of_its_own_and_keeps_ties_and_types(cut):
    model = Tied()
    model.second.bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    slim = cut(model, TIED_SLICES)
    assert type(slim) is Tied
    assert slim.second.weight is slim.first.weight
    assert type(slim.first.weight) is nn.Parameter
    assert [p.requires_grad for p in (slim.first.bias, slim.second.bias)] == [True, False]
    assert not storages & {p.untyped_storage().data_ptr() for p in slim.parameters()}
    assert slim.first.weight.untyped_storage().nbytes() == 9 * 4
    assert torch.equal(slim.first.weight, before["first.weight"][:3, :3])
    assert {name: vars(slim)[name] for name in SLICED_ATTRIBUTES} == SLICED_ATTRIBUTES


class Remembering(nn.Module):
    """Keeps what it computed of its weights: in a dict, and in a property that is computed once."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.features, self.cache = 6, {}
        assert self.shape == (6,)

    @functools.cached_property
    def shape(self):
        return (self.features,)

    def forward(self, x):
        weight = self.cache.setdefault("weight", 2 * self.layer.weight.detach())
        return nn.functional.linear(x, weight).view(-1, *self.shape)


@pytest.mark.parametrize("cut", [extract_model, shrink])
def test_what_was_computed_at_other_widths_is_computed_anew(cut):
    model, x = Remembering(), torch.ones(2, 4)
    expected = model(x)[:, :3]
    slices = Slices({"layer.weight": (HALF, None), "layer.bias": (HALF,)}, {"features": 3})
    assert torch.equal(cut(model, slices)(x), expected)


def test_a_replica_a_copy_and_a_model_cut_in_place_agree():
    model = randomise(TwoGroups()).eval()
    slices = Slices(
        {"inner.weight": (((0, 5),), None, None, None), "outer.weight": (None, ((0, 5),), None, None)}
        | {f"bn_inner.{leaf}": (((0, 5),),) for leaf in ("weight", "bias", "running_mean", "running_var")},
        {"inner.out_channels": 5, "outer.in_channels": 5, "bn_inner.num_features": 5},
    )
    extracted, shrunk = extract_model(model, slices), copy.deepcopy(model)
    shrink_model(shrunk, slices)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(extracted(x), shrunk(x))
    assert str(extracted) == str(shrunk)
    assert extracted.state_dict().keys() == shrunk.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(replicate(model, slices)(x), extracted(x))


def test_recurrent_layers_hold_their_sliced_weights_only():
    model = nn.Sequential(nn.LSTM(6, 8))  # of 4 gates
    gates = tuple((8 * gate, 3) for gate in range(4))
    sizes = {
        "weight_ih_l0": (gates, None),
        "weight_hh_l0": (gates, ((0, 3),)),
        "bias_ih_l0": (gates,),
        "bias_hh_l0": (gates,),
    }
    slices = Slices({f"0.{name}": axes for name, axes in sizes.items()}, {"0.hidden_size": 3})
    extracted, x = extract_model(model, slices), torch.rand(5, 2, 6)
    shrink_model(model, slices)
    assert all(a is b for a, b in zip(model[0]._flat_weights, model.parameters(), strict=True))
    assert torch.equal(torch.jit.script(model)(x)[0], extracted(x)[0])  # scripted before it ever ran


def test_extracting_makes_no_full_copy_of_a_tensor_that_is_sliced(monkeypatch):
    model = Tied()
    copies = []
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: copies.append(self.shape) or self)
    extract_model(model, TIED_SLICES)
    assert copies == []


class Caching(nn.Module):
    """Caches a tensor of its width by the device, as LeViT's attention does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))
        self.cache, self.names = {}, {"a": 1}

    def forward(self):
        if "cpu" not in self.cache:
            self.cache["cpu"] = 2 * self.weight.detach()
        return self.cache["cpu"]


def test_caches_of_one_width_are_not_read_at_another():
    model, slices = Caching(), Slices({"weight": (HALF,)}, {})
    widest, cache = model(), model.cache
    assert replicate(model, slices)().shape == (3,)
    assert model.cache is cache
    assert model() is widest
    assert extract_model(model, slices)().shape == (3,)


def test_only_caches_of_tensors_are_cleared():
    model = Caching()
    model()
    clear_caches([model, nn.ReLU()])
    assert model.cache == {}
    assert model.names == {"a": 1}


# -- one slice after another ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "earlier", "expected"),
    [
        ([(0, 3)], None, 3),
        ([(0, 3)], 5, 3),
        ([(0, 2), (4, 1)], None, [[0, 2], [4, 1]]),
        ([(1, 2)], None, [[1, 2]]),
        ([(0, 3)], [[2, 2], [6, 3]], [[2, 2], [6, 1]]),
        ([(0, 1), (2, 1)], [[0, 1], [5, 1], [1, 1]], 2),
    ],
)
def test_two_slices_of_an_axis_are_one(runs, earlier, expected):
    assert compose_runs(runs, earlier) == expected


def test_slices_within_a_module():
    half = ((0, 4),)
    slices = Slices({"body.a.weight": (half, None), "body2.b": (half,)}, {"body.a.groups": 4, "groups": 2})
    assert slices.within("body") == Slices({"a.weight": (half, None)}, {"a.groups": 4})
    assert slices.within("body.a") == Slices({"weight": (half, None)}, {"groups": 4})


class Scaled(nn.Module):
    """Multiplies by constants of a dict that the constructor fills, read in one of many ways."""

    def __init__(self, read):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.scales, self.read = {"mid": torch.tensor(3.0)}, read

    def forward(self, x):
        return self.last(getattr(self, self.read)(self.first(x).relu()))

    def contains(self, x):
        return x * self.scales["mid"] if "mid" in self.scales else x

    def is_filled(self, x):
        return x * next(iter(self.scales.values())) if self.scales else x

    def loops(self, x):
        for key in self.scales:
            x = x * self.scales[key]
        return x

    def passes_on(self, x):
        return multiply(self.scales, x)


def multiply(scales, x):
    for scale in scales.values():
        x = x * scale
    return x


@pytest.mark.parametrize("read", ["contains", "is_filled", "loops", "passes_on"])
def test_constants_in_a_dict_stay_however_they_are_read(read):
    torch.manual_seed(0)
    model, images = Scaled(read).eval(), torch.randn(2, 3, 8, 8)
    ordered = timm_autoslim.convert(model, images, order="l1")
    torch.testing.assert_close(ordered.model.eval()(images), model(images))
    supernet = timm_autoslim.convert(model, images)
    widths = supernet.space.min()
    extracted = supernet.extract(widths)
    assert extracted.scales == model.scales
    width = widths["first"]
    expected = model.first(images)[:, :width].relu() * 3
    expected = nn.functional.conv2d(expected, model.last.weight[:, :width], model.last.bias)
    torch.testing.assert_close(extracted(images), expected)
    assert torch.equal(supernet(images, widths), extracted(images))
