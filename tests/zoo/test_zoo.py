"""What must hold for every convolutional model of the zoo, at every kind of widths."""

from dataclasses import dataclass

import pytest
import torch
from helpers.comparisons import assert_same, outputs, snapshot
from helpers.marks import slow_but
from helpers.models import train_without_chance
from helpers.widths import some_widths
from helpers.zoo import ZOO, Member
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

import timm_autoslim
from timm_autoslim.slicing.tensors import take_slice
from timm_autoslim.supernet.order import reorder_channels
from timm_autoslim.supernet.supernet import Supernet

# Summation order is all that a permutation changes; in float64 that leaves more than 12 digits.
PERMUTED = 1e-10


@dataclass
class Case:
    model: nn.Module
    images: torch.Tensor
    before: tuple
    after: tuple
    supernet: Supernet


QUICK = ["timm/resnet10t"]  # residual branches


@pytest.fixture(scope="module", params=slow_but(QUICK, ZOO), ids=str)
def case(request):
    model = request.param.build()
    model.train()
    next(m for m in model.modules() if isinstance(m, (nn.Conv2d, _BatchNorm))).eval()  # a mixture of flags must survive
    images = request.param.images()
    before = snapshot(model)
    supernet = timm_autoslim.convert(model, images[:1])
    after = snapshot(model)
    return Case(model.eval(), images, before, after, supernet)


def test_convert_leaves_the_model_as_it_was(case):
    assert_same(case.before, case.after)


@torch.no_grad()
def test_the_widest_is_the_original_bit_for_bit(case):
    expected = case.model(case.images)
    assert expected.std() > 1e-3
    assert torch.equal(case.supernet(case.images), expected)
    assert torch.equal(case.supernet(case.images, case.supernet.space.max()), expected)
    widest = case.supernet.extract()
    assert type(widest) is type(case.model)
    assert torch.equal(widest(case.images), expected)


@torch.no_grad()
def test_subnets_are_the_extracted_models_bit_for_bit_and_cost_what_is_counted(case):
    before = snapshot(case.model)
    for name, widths in some_widths(case.supernet.space).items():
        slim = case.supernet.extract(widths)
        assert type(slim) is type(case.model)
        with FlopCounterMode(display=False) as counter:
            separate = slim(case.images)
        assert torch.equal(case.supernet(case.images, widths), separate), name
        cost = timm_autoslim.cost(case.supernet, widths)
        assert cost.params == sum(p.numel() for p in slim.parameters()), name
        assert 2 * cost.macs * len(case.images) == counter.get_total_flops(), name
    assert_same(before, snapshot(case.model))


def test_extracted_modules_have_attributes_that_fit_their_weights(case):
    slim = case.supernet.extract(some_widths(case.supernet.space)["arbitrary"])
    for path, module in slim.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            lengths = [module.out_channels, module.in_channels // module.groups]
        elif isinstance(module, nn.Linear):
            lengths = [module.out_features, module.in_features]
        elif isinstance(module, _BatchNorm):
            lengths = [module.num_features]
        else:
            continue
        assert list(module.weight.shape[: len(lengths)]) == lengths, path
    features = getattr(slim, "feature_info", None)
    if features is not None:
        maps = slim.forward_intermediates(case.images, intermediates_only=True)
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in features]
        assert slim.forward_features(case.images).shape[1] == slim.num_features


@torch.no_grad()
def test_permuting_the_channels_of_all_groups_changes_nothing(case):
    model = case.supernet.extract().double()
    permuted = reorder_channels(model, case.supernet.graph, "random")
    pairs = zip(model.state_dict().values(), permuted.state_dict().values(), strict=True)
    moved = sum(not torch.equal(a, b) for a, b in pairs)
    images = case.images[:1].double()
    torch.testing.assert_close(permuted(images), model(images), rtol=PERMUTED, atol=PERMUTED)
    assert moved > len(case.supernet.space)


def test_half_width_takes_most_of_the_macs_away(case):
    space = case.supernet.space
    assert timm_autoslim.cost(case.supernet, space.uniform(0.5)).macs < 0.4 * timm_autoslim.cost(case.supernet).macs


def test_gradients_reach_the_slices_and_nothing_else(case):
    supernet = case.supernet
    widths = some_widths(supernet.space, seed=1)["random"]
    slim = train_without_chance(supernet.extract(widths))
    train_without_chance(case.model)
    try:
        sum(t.square().mean() for t in outputs(slim(case.images))).backward()
        with supernet.at(widths):
            sum(t.square().mean() for t in outputs(supernet(case.images))).backward()
        kept = supernet.graph.slices(widths.values_).tensors
        separate = dict(slim.named_parameters())
        for name, parameter in case.model.named_parameters():
            grad = parameter.grad
            piece = take_slice(grad, kept.get(name, (None,) * grad.dim()))
            assert torch.equal(piece, separate[name].grad), name
            assert grad.isfinite().all(), name
            assert grad.count_nonzero() == piece.count_nonzero(), name  # zero outside
    finally:
        case.model.eval()
        case.model.zero_grad()


@torch.no_grad()
def test_running_statistics_move_only_at_the_widest(case):
    def statistics():
        return {n: b.clone() for n, b in case.model.named_buffers() if "running" in n or "tracked" in n}

    before = statistics()
    if not before:
        pytest.skip("no BatchNorm")
    train_without_chance(case.model)
    try:
        for widths in some_widths(case.supernet.space).values():
            case.supernet(case.images, widths)
            assert all(torch.equal(b, before[n]) for n, b in statistics().items())
        case.supernet(case.images, case.supernet.space.max())
        assert not any(torch.equal(b, before[n]) for n, b in statistics().items())
    finally:
        case.model.eval()
        for name, buffer in case.model.named_buffers():
            if name in before:
                buffer.copy_(before[name])


# -- removing is silencing --------------------------------------------------------------------------------------------


@torch.no_grad()
def silence(model, kept):
    """Silence the removed channels: zero their BatchNorm's weight and bias, or linear row."""
    for path, module in model.named_modules():
        axes = kept.get(f"{path}.weight")
        if isinstance(module, (_BatchNorm, nn.Linear)) and axes is not None and axes[0] is not None:
            removed = torch.ones(len(module.weight), dtype=torch.bool)
            for start, length in axes[0]:
                removed[start : start + length] = False
            module.weight[removed] = 0
            module.bias[removed] = 0


SILENCED = [
    Member("timm", "resnet10t"),
    Member("torchvision", "resnet18"),
    Member("timm", "mobilenetv1_100"),
    Member("torchvision", "mobilenet_v2"),
    Member("torchvision", "vgg11_bn", small_head=True),
    Member("torchvision", "googlenet", arguments={"init_weights": False}),
]


@pytest.mark.parametrize("member", slow_but(["timm/resnet10t"], SILENCED), ids=str)
@torch.no_grad()
def test_removing_channels_is_silencing_them(member):
    model = member.build().double()
    images = member.images().double()
    supernet = timm_autoslim.convert(model, images[:1])
    loud = model(images)
    for name, widths in some_widths(supernet.space).items():
        removed = supernet.extract(widths)(images)
        silent = supernet.extract()
        silence(silent, supernet.graph.slices(widths.values_).tensors)
        torch.testing.assert_close(
            silent(images), removed, rtol=PERMUTED, atol=PERMUTED, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert not torch.allclose(loud, removed)
