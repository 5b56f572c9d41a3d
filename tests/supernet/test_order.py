"""Channels ordered by importance: what the criteria score, and that the order changes nothing but the order."""

import numpy as np
import pytest
import timm
import torch
from helpers.comparisons import assert_same, snapshot
from helpers.models import TwoGroups, randomise
from helpers.zoo import Member
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import WidthError
from timm_autoslim.supernet.order import CRITERIA, make_pruning_group, permute_units, reorder_channels, score_units

IMAGE = torch.zeros(1, 3, 8, 8)
# An order changes the order of float32 sums, nothing else.
ROUNDING = 1e-5
EXACT = 1e-10


@pytest.fixture
def model():
    return randomise(TwoGroups()).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 8, 8)


def with_gradients(model, images):
    model(images).square().mean().backward()
    return model


def find_strand(supernet, name):
    return next(i for i, s in enumerate(supernet.graph.strands) if supernet.space.names[s.group] == name)


@pytest.mark.parametrize("order", CRITERIA)
def test_every_criterion_permutes_and_changes_nothing_else(model, images, order):
    with_gradients(model, images)
    supernet = convert(model, IMAGE, order=order, batches=[images])
    assert type(supernet.model) is TwoGroups
    torch.testing.assert_close(supernet(images), model(images), rtol=ROUNDING, atol=ROUNDING)
    double = convert(model.double(), IMAGE.double(), order=order, batches=[images.double()])
    torch.testing.assert_close(double(images.double()), model(images.double()), rtol=EXACT, atol=EXACT)
    for name, tensor in double.model.state_dict().items():  # the same numbers, in another order
        assert torch.equal(tensor.flatten().sort().values, model.state_dict()[name].flatten().sort().values), name
    assert not torch.equal(double.model.inner.weight, model.inner.weight)
    widths = double.space.from_dict({"stem": 5, "inner": 7})
    assert torch.equal(double(images.double(), widths), double.extract(widths)(images.double()))


def test_scores_are_torch_prunings_over_all_layers_of_a_channel(model):
    """The inner channels are outputs of one convolution and its BatchNorm, and inputs of the next convolution."""
    layers = (
        model.inner.weight.abs().sum((1, 2, 3)),
        model.bn_inner.weight.abs(),
        model.outer.weight.abs().sum((0, 2, 3)),
    )
    total = sum(layers)
    supernet = convert(model, IMAGE)
    scores = score_units(model, supernet.graph, "l1")[find_strand(supernet, "inner")]
    np.testing.assert_allclose(scores, (total / total.mean()).detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize(("order", "power"), [("l1", 1), ("l2", 2)])
def test_magnitudes_are_sorted_in_the_ordered_model(model, order, power):
    for parameter in (model.bn_inner.weight, model.bn_inner.bias, model.outer.weight):
        nn.init.constant_(parameter, 0.5)  # now the filters of the inner convolution alone tell channels apart
    supernet = convert(model, IMAGE, order=order)
    strength = supernet.model.inner.weight.abs().pow(power).sum((1, 2, 3))
    assert strength.tolist() == sorted(strength.tolist(), reverse=True)
    assert model.inner.weight.abs().pow(power).sum((1, 2, 3)).tolist() != strength.tolist()


def test_bn_scale_sorts_by_the_scale_of_batch_norm(model):
    supernet = convert(model, IMAGE, order="bn_scale")
    scale = supernet.model.bn_inner.weight.abs().tolist()
    assert scale == sorted(scale, reverse=True)
    assert scale == sorted(model.bn_inner.weight.abs().tolist(), reverse=True)


def test_taylor_sorts_by_gradient_times_weight_and_asks_for_gradients(model, images):
    message = r'^stem\.weight: got no gradient; needed: a gradient, which the criterion "taylor" reads; run the loss'
    with pytest.raises(WidthError, match=message):
        convert(model, IMAGE, order="taylor")
    with_gradients(model, images)
    with torch.no_grad():  # gradients of a channel that is to be the best, and of one that is to be the worst
        for parameter, axis in ((model.inner.weight, 0), (model.outer.weight, 1)):
            parameter.grad.select(axis, 11).mul_(1000)
            parameter.grad.select(axis, 3).zero_()
        for parameter in (model.bn_inner.weight, model.bn_inner.bias):
            parameter.grad.zero_()
    supernet = convert(model, IMAGE, order="taylor")
    assert torch.equal(supernet.model.bn_inner.bias[0], model.bn_inner.bias[11])
    assert torch.equal(supernet.model.bn_inner.bias[-1], model.bn_inner.bias[3])


@pytest.mark.parametrize("frozen", ["inner.weight", "inner.bias", "head.weight"])
def test_taylor_names_a_frozen_weight_that_it_reads(model, images, frozen):
    model.inner.bias = nn.Parameter(torch.randn(16))
    model.get_parameter(frozen).requires_grad_(False)
    with_gradients(model, images)
    message = rf'^{frozen}: got no gradient; .* the criterion "taylor" reads; .* requires_grad=True for every weight'
    with pytest.raises(WidthError, match=message):
        convert(model, IMAGE, order="taylor")


def test_taylor_takes_frozen_weights_that_it_does_not_read(model, images):
    model.head.bias.requires_grad_(False)  # of the outputs, which nothing sorts
    for norm in (model.bn, model.bn_inner, model.bn_outer):  # as in many a fine-tuning
        norm.requires_grad_(False)
    ordered = convert(with_gradients(model, images), IMAGE, order="taylor").model
    assert not torch.equal(ordered.inner.weight, model.inner.weight)


def test_a_random_order_is_the_same_at_each_call_and_leaves_the_global_generator_alone(model):
    torch.manual_seed(1)
    first = convert(model, IMAGE, order="random").model
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = convert(model, IMAGE, order="random").model
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.inner.weight, model.inner.weight)


def test_an_unknown_order_is_refused(model):
    with pytest.raises(WidthError, match=r"^order: got 'l3'; needed: None or one of \['l1', 'l2', 'bn_scale', 'fpgm'"):
        convert(model, IMAGE, order="l3")


@pytest.mark.parametrize("order", ["l1", "random"])
def test_the_model_itself_stays_as_it_was(model, images, order):
    before = snapshot(model)
    convert(model, IMAGE, order=order)
    assert_same(before, snapshot(model))


def test_narrow_subnets_keep_the_best_channels(model, images):
    """With all but four inner channels silent, four are enough: only an order by importance finds them."""
    loud = [2, 5, 11, 14]
    with torch.no_grad():
        silent = [i for i in range(16) if i not in loud]
        model.inner.weight[silent] *= 1e-8
        model.outer.weight[:, silent] *= 1e-8
        model.bn_inner.weight[silent] *= 1e-8
        model.bn_inner.bias[silent] = 0
    unordered, ordered = convert(model, IMAGE), convert(model, IMAGE, order="l1")
    widths = unordered.space.from_channels({"inner": 4})
    expected = model(images)
    torch.testing.assert_close(ordered(images, widths), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unordered(images, widths), expected, rtol=1e-2, atol=1e-2)


def test_a_permutation_moves_channels_where_it_says():
    model = randomise(TwoGroups())
    supernet = convert(model, IMAGE)
    inner = find_strand(supernet, "inner")
    order = np.roll(np.arange(16), 3)
    moved = permute_units(model, supernet.graph, {inner: order})
    assert torch.equal(moved.inner.weight, model.inner.weight[order])
    assert torch.equal(moved.outer.weight, model.outer.weight[:, order])
    assert torch.equal(moved.bn_inner.running_var, model.bn_inner.running_var[order])
    for name in ("stem.weight", "bn.weight", "head.weight", "bn_outer.running_mean"):
        assert torch.equal(moved.state_dict()[name], model.state_dict()[name])


class Remembering(nn.Module):
    """Keeps in a dict what it computed of the weights of its head."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Linear(16, 4)
        self.cache = {}

    def forward(self, x):
        weight = self.cache.setdefault("weight", 2 * self.head.weight.detach())
        return nn.functional.linear(self.inner(self.stem(x).relu()).mean((2, 3)), weight)


def test_what_a_module_keeps_of_the_weights_of_another_is_forgotten(images):
    model = randomise(Remembering()).eval()
    expected = model(images)
    supernet = convert(model, IMAGE, order="l1")
    torch.testing.assert_close(supernet(images), expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.slow
def test_channels_that_a_shuffle_matches_by_position_stay_where_they_are():
    member = Member("torchvision", "shufflenet_v2_x0_5")
    model, images = member.build().double(), member.images().double()
    supernet = convert(model, images[:1])
    graph = supernet.graph
    assert {s.ordered for s in graph.strands} == {True, False}
    permuted = reorder_channels(model, graph, "random")
    torch.testing.assert_close(permuted(images), model(images), rtol=EXACT, atol=EXACT)
    before, after = model.state_dict(), permuted.state_dict()
    for (name, _), place in graph.places.items():
        if before[name].dim() == 1:
            free = np.array([s >= 0 and not graph.strands[s].ordered for s in place.strand.tolist()])
            assert torch.equal(before[name][~free], after[name][~free]), name
            assert not free.any() or not torch.equal(before[name][free], after[name][free]), name


def test_groups_for_torch_pruning_name_all_layers_of_a_strand():
    supernet = convert(timm.create_model("resnet10t").eval(), torch.zeros(1, 3, 64, 64))
    group = make_pruning_group(supernet.model, supernet.graph, find_strand(supernet, "layer2.0.conv2"))
    names = {dep.target.name.partition(" ")[0]: len(indices) for dep, indices in group}
    assert names == dict.fromkeys(
        ["layer2.0.conv2", "layer2.0.bn2", "layer2.0.downsample.1", "layer2.0.downsample.2", "layer3.0.conv1",
         "layer3.0.downsample.1"], 128
    )  # fmt: skip


def test_channels_are_reordered_in_the_same_memory_layout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    reordered = reorder_channels(model, convert(model, torch.randn(2, 3, 8, 8)).graph, "l1")
    assert reordered[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not reordered[0].weight.is_contiguous()
    assert not torch.equal(reordered[0].weight, model[0].weight)


@pytest.mark.parametrize("order", [name for name in CRITERIA if name not in ("taylor", "reconstruction")])
def test_what_grouped_convolutions_read_and_put_out_can_be_ordered(order):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(16, 5, 1)
    )
    images = torch.randn(2, 3, 8, 8)
    supernet = convert(model.double().eval(), images.double(), order=order)
    torch.testing.assert_close(supernet(images.double()), model(images.double()))
