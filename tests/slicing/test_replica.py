"""Replicas: subnets that leave no trace in the model, whatever they write and whatever refers to a module."""

import collections
import functools
import types

import pytest
import torch
from helpers.comparisons import assert_same, snapshot
from helpers.models import TwoGroups, randomise
from helpers.tied import HALF, SLICED_ATTRIBUTES, TIED_SLICES, Tied
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices, extract_model

Pair = collections.namedtuple("Pair", "first second")


def test_a_replica_is_the_extracted_model_and_leaves_the_model_alone():
    model = Tied()
    before = snapshot(model)
    x = torch.rand(2, 3)
    subnet = replicate(model, TIED_SLICES)
    assert type(subnet) is Tied
    assert subnet.first.weight.shape == (3, 3)
    assert subnet.second.weight is subnet.first.weight
    assert {name: vars(subnet)[name] for name in SLICED_ATTRIBUTES} == SLICED_ATTRIBUTES
    assert torch.equal(subnet(x), extract_model(model, TIED_SLICES)(x))
    assert_same(before, snapshot(model))


def test_what_is_not_narrower_is_shared():
    model = Tied()
    subnet = replicate(model, Slices({}, {}))
    assert subnet.first.weight is model.first.weight
    assert subnet.first is not model.first


@pytest.mark.parametrize(
    ("slices", "error"),
    [
        (Slices({**TIED_SLICES.tensors, "third.weight": (HALF,)}, {}), KeyError),
        (Slices({**TIED_SLICES.tensors, "first.gain": (HALF,)}, {}), KeyError),
        (Slices({**TIED_SLICES.tensors, "scale": (((0, 7),),)}, {}), RuntimeError),
        (Slices(TIED_SLICES.tensors, {"width": 3, "height": 3}), KeyError),
    ],
)
def test_slices_that_do_not_fit_are_refused_and_change_nothing(slices, error):
    model = Tied()
    before = snapshot(model)
    for cut in (replicate, extract_model):
        with pytest.raises(error):
            cut(model, slices)
        assert_same(before, snapshot(model))


# -- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_parameters_of_the_model():
    model = Tied()
    replicate(model, TIED_SLICES)(torch.rand(2, 3)).sum().backward()
    assert model.first.weight.grad.shape == (6, 6)
    assert model.first.weight.grad[:3, :3].count_nonzero() == 9
    assert model.first.weight.grad.count_nonzero() == 9
    assert model.first.bias.grad[3:].tolist() == [0, 0, 0]


class Halved(nn.Module):
    """Runs its layer as a subnet."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return replicate(self.layer, Slices({"weight": (HALF, None), "bias": (HALF,)}, {}))(x)


def test_tensors_in_the_place_of_parameters_get_gradients_too():
    model, x = Halved().double(), torch.rand(2, 4, dtype=torch.double)
    model(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    others = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    halves = {name: other * 0.5 for name, other in others.items()}
    functional_call(model, halves, (x,)).square().sum().backward()
    for name, other in others.items():
        assert torch.equal(other.grad, 0.5 * expected[name])
    values = {name: p.detach() for name, p in model.named_parameters()}
    gradients = grad(lambda given: functional_call(model, given, (x,)).square().sum())(values)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=0)


class Checkpointed(nn.Module):
    """Computes its layer again in backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(4, 6), reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_compute_the_subnet_again(reentrant):
    model, x = Checkpointed(reentrant), torch.rand(2, 4, requires_grad=True)
    slices = Slices({"layer.weight": (HALF, None), "layer.bias": (HALF,)}, {})
    extracted = extract_model(model, slices)
    for subnet in (replicate(model, slices), extracted):
        subnet(x).square().sum().backward()
    assert torch.equal(model.layer.weight.grad[:3], extracted.layer.weight.grad)
    assert not model.layer.weight.grad[3:].any()


# -- what a forward writes --------------------------------------------------------------------------------------------


def test_statistics_follow_the_model_alone():
    model = randomise(TwoGroups()).train()
    before = snapshot(model)
    subnet = replicate(model, Slices({}, {}))
    subnet.bn(torch.rand(2, 8, 4, 4))
    assert not torch.equal(subnet.bn.running_mean, before[0]["bn.running_mean"])
    assert subnet.bn.num_batches_tracked == 8
    assert_same(before, snapshot(model))


class Writing(nn.Module):
    """Writes every kind of state in its forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.last, self.calls, self.seen, self.sums = torch.zeros(3), 0, [], {"a": [0]}
        self.recent = collections.deque(maxlen=1)

    def forward(self, x):
        self.total += x
        self.last.copy_(x)
        self.calls += 1
        self.seen.append(self.calls)
        self.recent.append(self.calls)
        self.sums["a"][0] += 1
        return x


def test_state_of_every_kind_is_copied():
    model = Writing()
    subnet = replicate(model, Slices({}, {}))
    for _ in range(2):
        subnet(torch.ones(3))
    assert (subnet.calls, subnet.seen, subnet.sums) == (2, [1, 2], {"a": [2]})
    assert (model.calls, model.seen, model.sums) == (0, [], {"a": [0]})
    assert (list(subnet.recent), subnet.recent.maxlen, list(model.recent)) == ([2], 1, [])
    assert not model.total.any()
    assert not model.last.any()


# -- what refers to modules -------------------------------------------------------------------------------------------


class Referring(nn.Module):
    """Runs its layer by way of what refers to it."""

    def __init__(self, refer):
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.way = refer(self)

    def forward(self, x):
        way = self.way
        while isinstance(way, (list, tuple, dict, collections.deque)):
            way = way["layer"] if isinstance(way, dict) else way[0]
        return way(x)


def bind(model):
    model.layer.forward = types.MethodType(
        lambda self, x: 2 * nn.functional.linear(x, self.weight, self.bias), model.layer
    )
    return model.layer


def close_over(model):
    layer = model.layer
    return lambda x: layer(x)


def close_over_a_deque(model):
    layers = collections.deque([(model.layer,)], 3)
    return lambda x: layers[0][0](x)


def close_over_a_list(model):
    layers = [model.layer]

    def run(x, *, shift=1.0):
        return layers[0](x) + shift

    return run


@pytest.mark.parametrize(
    "refer",
    [
        lambda model: [model.layer],
        lambda model: ({"layer": [model.layer]},),
        lambda model: Pair(model.layer, 3),
        lambda model: collections.deque([Pair([model.layer], None)], 2),
        lambda model: model.layer.forward,
        lambda model: functools.partial(nn.Linear.forward, model.layer),
        bind,
        close_over,
        close_over_a_list,
        close_over_a_deque,
    ],
    ids=[
        "list",
        "nested",
        "named tuple",
        "deque",
        "bound method",
        "partial",
        "bound forward",
        "closure",
        "closure over a list",
        "closure over a deque",
    ],
)
def test_every_way_to_a_module_leads_to_that_of_the_replica(refer):
    model, x = Referring(refer), torch.randint(9, (2, 4)).float()
    with torch.no_grad():
        for parameter in model.parameters():  # integers: sums are exact in any order
            parameter.copy_(torch.randint(-9, 9, parameter.shape))
    subnet = replicate(model, Slices({"layer.weight": (HALF, None), "layer.bias": (HALF,)}, {}))
    assert torch.equal(subnet(x), model(x)[:, :3])
    assert subnet(x).shape == (2, 3)


def test_hooks_run_on_the_replica_and_keep_what_they_write_to():
    model, outputs = nn.Sequential(nn.Linear(4, 6)), []
    layer = model[0]
    layer.register_forward_hook(lambda module, args, out: outputs.append((module.weight is layer.weight, out.shape)))
    subnet = replicate(model, Slices({"0.weight": (HALF, None), "0.bias": (HALF,)}, {}))
    subnet(torch.rand(2, 4))
    model(torch.rand(2, 4))
    assert outputs == [(True, (2, 3)), (True, (2, 6))]


def test_a_hook_that_the_replica_gets_is_not_the_models():
    model = nn.Sequential(nn.Linear(4, 6))
    replicate(model, Slices({}, {}))[0].register_forward_hook(lambda *_: pytest.fail("it is the replica's"))
    model(torch.rand(2, 4))
