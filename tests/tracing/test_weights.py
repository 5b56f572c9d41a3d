"""Modules and weights that are used twice, and weights that are computed."""

import dataclasses
import functools

import pytest
import torch
from helpers.conversions import IMAGE, Net, check_conversion, make_conv, make_images, make_net, run_in_a_row
from helpers.models import randomise
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from timm_autoslim.tracing import ops

EXACT = 1e-12  # float64: rounding alone

# -- shared modules and weights ---------------------------------------------------------------------------------------


def make_pair(build, *leaves):
    """Return two modules, of which the second has tensors of the first."""
    first, second = build(), build()
    for leaf in leaves:
        setattr(second, leaf, getattr(first, leaf))
    return {"a": first, "b": second}


def name_twice(module):
    return {"a": module, "b": module}


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x * self.mask


def make_bottleneck():
    return nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1))


def make_masks():
    return {name: Mask(mask) for mask in [torch.rand(8, 1, 1)] for name in ("a", "b")}


def decode(self, x):
    x = self.a(self.maps(x).permute(0, 2, 3, 1)).relu()
    return self.logits(F.linear(x, self.b.weight.t()).permute(0, 3, 1, 2))


def make_embedding_and_classifier():
    layers = {"a": nn.Embedding(10, 8), "b": nn.Linear(8, 10, bias=False)}
    layers["b"].weight = layers["a"].weight
    return layers


def run_through_a_list(self, x):
    return self.head(F.linear(self.a(self.maps(x).mean((2, 3))).relu(), self.a.weights[0].t()))


def make_layer_with_its_weight_in_a_list():
    layer = nn.Linear(8, 6, bias=False)
    layer.weights = [layer.weight]
    return {"a": layer}


# the body, its layers, the groups, and the paths of one object in an extracted model
SHARED = {
    "a module of two names": (run_in_a_row, lambda: name_twice(nn.Conv2d(8, 8, 1)), {}, ("a", "b")),
    "a norm of two names": (run_in_a_row, lambda: name_twice(nn.BatchNorm2d(8)), {}, ("a", "b")),
    "a block of two names": (run_in_a_row, lambda: name_twice(make_bottleneck()), {"a.0": 4}, ("a", "b")),
    "a block inside another": (
        run_in_a_row, lambda: {"a": (block := make_bottleneck()), "b": nn.Sequential(block, nn.ReLU(), block)},
        {"a.0": 4}, ("a", "b.0", "b.2"),
    ),
    "a module that runs twice": (
        lambda s, x: s.logits(s.a(s.a(s.maps(x)).relu())), lambda: {"a": nn.Conv2d(8, 8, 1)}, {}, ()
    ),
    "a weight": (run_in_a_row, lambda: make_pair(lambda: nn.Conv2d(8, 8, 1), "weight"), {}, ("a.weight", "b.weight")),
    "a weight and its transpose": (
        decode, lambda: make_pair(lambda: nn.Linear(8, 6, bias=False), "weight"), {"a": 6}, ("a.weight", "b.weight")
    ),
    "an embedding that is also the classifier": (
        lambda s, x: s.b(s.maps(x).mean((2, 3)) + s.a(torch.zeros(len(x), dtype=torch.long, device=x.device))),
        make_embedding_and_classifier, {}, ("a.weight", "b.weight"),
    ),
    "running statistics": (
        run_in_a_row, lambda: make_pair(lambda: nn.BatchNorm2d(8), "running_mean", "running_var"), {},
        ("a.running_mean", "b.running_mean"),
    ),
    "a buffer": (run_in_a_row, make_masks, {}, ("a.mask", "b.mask")),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_modules_and_weights_that_are_shared_stay_shared(name):
    body, layers, groups, same = SHARED[name]
    supernet = check_conversion(randomise(Net(body, **layers())))
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16, **groups}
    assert not supernet.repairs
    extracted = supernet.extract(supernet.space.uniform(0.5))
    objects = [functools.reduce(getattr, path.split("."), extracted) for path in same]
    assert all(part is objects[0] for part in objects)


def test_a_weight_that_is_also_in_a_list_is_sliced_there_too():
    supernet = check_conversion(randomise(Net(run_through_a_list, **make_layer_with_its_weight_in_a_list())))
    assert supernet.space.names == ("stem", "inner", "a")


def test_a_shared_weight_collects_the_gradients_of_both_places():
    body, layers, *_ = SHARED["a weight and its transpose"]
    supernet = check_conversion(randomise(Net(body, **layers())).double(), IMAGE.double(), make_images().double())
    widths = supernet.space.from_dict({"stem": 5, "inner": 16, "a": 3})
    extracted, x = supernet.extract(widths), make_images().double()
    supernet(x, widths).square().mean().backward()
    extracted.train().bn.eval()
    extracted(x).square().mean().backward()
    gradient = supernet.model.a.weight.grad
    torch.testing.assert_close(gradient[:3, :5], extracted.a.weight.grad, rtol=EXACT, atol=EXACT)
    assert not gradient[3:].any()
    assert not gradient[:, 5:].any()


# -- weights that are computed ----------------------------------------------------------------------------------------


class Standardised(nn.Module):
    def forward(self, weight):
        return weight - weight.mean((1, 2, 3), keepdim=True)


def parametrised(layer):
    register_parametrization(layer, "weight", Standardised())
    return layer


PARAMETRISED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "of the user": parametrised,
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_weights_are_followed_or_fixed(name, training):
    torch.manual_seed(0)
    model = randomise(Net(run_in_a_row)).train()
    model.a, model.b = PARAMETRISED[name](nn.Conv2d(8, 6, 3, padding=1)), nn.Conv2d(6, 8, 1)
    supernet = check_conversion(model, count=False)  # weights are computed once for all images
    assert "inner" in supernet.space.names
    assert ("a" in supernet.space.names) == (name in ("weight norm", "of the user"))
    supernet.train(training)
    widths = supernet.space.min()
    extracted, x = supernet.extract(widths), make_images()
    with torch.no_grad():
        assert torch.equal(supernet(x, widths), extracted(x))


def test_a_bias_of_another_length_is_found_by_the_proof(monkeypatch):
    """Torch runs such a convolution on the meta device."""
    rule = ops.RULES["convolution"]

    def forgetful(flow, op):
        rule(flow, dataclasses.replace(op, arguments={**op.arguments, "bias": None}))

    monkeypatch.setattr(ops, "RULES", {**ops.RULES, "convolution": forgetful})
    for layer in (make_conv(), nn.ConvTranspose2d(8, 6, 1), nn.Conv2d(8, 6, 1, groups=2)):
        supernet = check_conversion(make_net(layer))
        assert any(reason.startswith("a: in a subnet, ") for reason in supernet.repairs)
        assert ("a.bias", 0) in supernet.graph.fixed
