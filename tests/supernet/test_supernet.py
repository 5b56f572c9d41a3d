"""The supernet: conversion, forward at widths, and extraction."""

import gc
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers.comparisons import assert_same, snapshot
from helpers.models import CLASSES, TwoGroups, randomise
from helpers.widths import arbitrary_widths, some_widths
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_autoslim import convert
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import WidthError
from timm_autoslim.slicing.slices import Slices

IMAGE = torch.zeros(1, 3, 8, 8)


# -- forward -----------------------------------------------------------------------------------------------------------


def test_threads_run_subnets_of_their_own(supernet, images, narrow):
    choices = [narrow, supernet.space.min(), None]
    with torch.no_grad():
        expected = [supernet(images, widths) for widths in choices]

    def run(index):
        with torch.no_grad():
            if index % 2 and choices[index % 3] is not None:
                with supernet.at(choices[index % 3]):
                    return torch.equal(supernet(images), expected[index % 3])
            return torch.equal(supernet(images, choices[index % 3]), expected[index % 3])

    before, interval = snapshot(supernet.model), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, range(300)))
    finally:
        sys.setswitchinterval(interval)
    assert_same(before, snapshot(supernet.model))


def test_a_forward_that_raises_leaves_the_supernet_as_it_was(supernet, narrow):
    before = snapshot(supernet.model)
    with pytest.raises(RuntimeError, match="channels"):
        supernet(torch.zeros(1, 4, 8, 8), narrow)
    assert_same(before, snapshot(supernet.model))
    supernet(IMAGE, narrow)


@pytest.mark.parametrize("method", ["forward", "at", "extract"])
def test_widths_of_another_model_are_refused(supernet, method):
    other = convert(TwoGroups(16), IMAGE).space.max()
    calls = {
        "forward": lambda: supernet(IMAGE, other),
        "at": lambda: supernet.at(other).__enter__(),
        "extract": lambda: supernet.extract(other),
    }
    with pytest.raises(WidthError, match=r"got widths of another model \(2 groups, space \w+\)"):
        calls[method]()
    with supernet.at(supernet.space.min()):  # no block is open
        supernet(IMAGE)


@pytest.mark.slow
def test_many_subnets_stay_right_and_take_no_more_memory_than_some():
    supernet, images = convert(randomise(TwoGroups(32)).eval(), IMAGE), torch.randn(4, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    several = {arbitrary_widths(supernet.space, generator) for _ in range(120)}
    assert len(several) > 100
    gc.collect()
    before = sum(isinstance(thing, Slices) for thing in gc.get_objects())
    first = {widths: supernet(images, widths) for widths in several}
    assert sum(isinstance(thing, Slices) for thing in gc.get_objects()) - before < 80
    for widths, out in first.items():
        assert torch.equal(supernet(images, widths), out)


def test_training_moves_the_shared_weights_of_every_subnet(supernet, images, narrow):
    before = supernet(images, narrow), supernet(images)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    supernet(images, narrow).square().mean().backward()
    optimizer.step()
    after = supernet(images, narrow), supernet(images)
    assert not torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert torch.equal(supernet(images, narrow), supernet.extract(narrow)(images))


def test_loading_weights_reaches_every_subnet(supernet, images, narrow):
    other = randomise(TwoGroups()).eval()
    supernet.load_state_dict({f"model.{name}": value for name, value in other.state_dict().items()})
    assert torch.equal(supernet(images, narrow), convert(other, IMAGE)(images, narrow))


class Checkpointed(TwoGroups):
    """The same network, but the inner part is computed again in backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def part(self, x):
        return self.bn_outer(self.outer(self.bn_inner(self.inner(x)).relu()))

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = x + checkpoint(self.part, x, use_reentrant=self.reentrant)
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_computes_the_subnet_again(reentrant, images):
    supernet = convert(randomise(Checkpointed(reentrant)).eval(), IMAGE)
    widths = supernet.space.from_channels({"inner": 3})  # only inside the part that runs again
    original = TwoGroups().eval()
    original.load_state_dict(supernet.model.state_dict())
    reference = convert(original, IMAGE)
    reference(images, reference.space.from_channels({"inner": 3})).square().mean().backward()
    supernet(images, widths).square().mean().backward()
    for expected, parameter in zip(reference.parameters(), supernet.parameters(), strict=True):
        assert torch.equal(expected.grad, parameter.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_supernet_needs_the_widths_where_blocks_are_used(supernet, images, narrow, reentrant):
    def compute(*widths):
        return checkpoint(supernet, images.requires_grad_(), *widths, use_reentrant=reentrant).square().mean()

    def take_gradients():
        gradients = [parameter.grad for parameter in supernet.parameters()]
        supernet.zero_grad()
        return gradients

    supernet(images).square().mean().backward()
    expected = take_gradients()
    compute().backward()  # without blocks the widest alone can be meant
    for gradient, other in zip(expected, take_gradients(), strict=True):
        assert torch.equal(gradient, other)
    supernet(images, narrow).square().mean().backward()
    expected = take_gradients()
    compute(narrow).backward()
    for gradient, other in zip(expected, take_gradients(), strict=True):
        assert torch.equal(gradient, other)
    with supernet.at(narrow):
        loss = compute()
    before = snapshot(supernet.model)
    with pytest.raises(WidthError, match=r"pass them along: checkpoint\(supernet, images, widths\)"):
        loss.backward()
    assert_same(before, snapshot(supernet.model))
    with supernet.at(supernet.space.min()), pytest.raises(WidthError, match="widths: got none"):
        compute().backward()


@pytest.mark.parametrize("kind", ["narrow", "block"])
def test_narrow_calls_with_checkpoints_move_no_statistics(kind):
    model = timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=CLASSES).train()
    images = torch.randn(4, 3, 32, 32)
    supernet = convert(model, images[:1])
    model.set_grad_checkpointing(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if kind == "narrow":
        out = supernet(images, supernet.space.min())
    else:
        with supernet.at(supernet.space.min()):
            out = supernet(images)
    out.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_example_has_the_shape_that_was_traced_and_any_batch_size(supernet):
    assert tuple(supernet.example().shape) == (1, 3, 8, 8)
    example = convert(TwoGroups(), torch.zeros(5, 3, 8, 8)).example(7)
    assert tuple(example.shape) == (7, 3, 8, 8)
    assert example.device.type == "meta"


# -- extract ----------------------------------------------------------------------------------------------------------


def test_an_extracted_model_shares_nothing_with_the_supernet(supernet, images, narrow):
    slim = supernet.extract(narrow)
    before, out = snapshot(supernet.model), slim(images)
    with torch.no_grad():
        for tensor in slim.state_dict().values():
            tensor.zero_()
    assert_same(before, snapshot(supernet.model))
    again = supernet.extract(narrow)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.zero_()
    assert torch.equal(again(images), out)


def test_the_statistics_of_a_narrower_subnet_are_marked_as_not_its_own(supernet, narrow):
    for widths in (narrow, supernet.space.max().replace("inner", 15)):
        slim = supernet.extract(widths)
        assert [m.num_batches_tracked.item() for m in slim.modules() if isinstance(m, nn.BatchNorm2d)] == [-43] * 3
    widest = supernet.extract()
    assert [m.num_batches_tracked.item() for m in widest.modules() if isinstance(m, nn.BatchNorm2d)] == [7, 7, 7]
    assert torch.equal(widest.bn.running_mean, supernet.model.bn.running_mean)


def test_the_spec_says_what_was_kept_and_goes_through_json(supernet, narrow):
    slim = supernet.extract(narrow)
    spec = slim.autoslim
    assert Spec.parse(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.format == 1
    assert spec.widths == {"stem": 5, "inner": 7}
    assert spec.sizes["inner.weight"] == (7, 5, None, None)
    assert spec.sizes["bn.running_var"] == (5,)
    assert spec.sizes["head.weight"] == (None, 5)
    assert "head.bias" not in spec.sizes
    for name, tensor in supernet.model.state_dict().items():
        kept = spec.sizes.get(name, [None] * tensor.dim())
        expected = [n if k is None else k for n, k in zip(tensor.shape, kept, strict=True)]
        assert list(slim.state_dict()[name].shape) == expected
    assert spec.attributes["inner.out_channels"] == 7
    assert spec.attributes["head.in_features"] == 5
    assert supernet.extract().autoslim.sizes == {}
    assert supernet.extract().autoslim.attributes == {}


def test_an_extracted_model_says_itself_how_wide_it_is(supernet, narrow):
    expected = TwoGroups()
    expected.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    expected.bn = expected.bn_outer = nn.BatchNorm2d(5)
    expected.inner = nn.Conv2d(5, 7, 3, padding=1, bias=False)
    expected.bn_inner = nn.BatchNorm2d(7)
    expected.outer = nn.Conv2d(7, 5, 1, bias=False)
    expected.head = nn.Linear(5, CLASSES)
    assert str(supernet.extract(narrow)) == str(expected)


def test_what_timm_promises_about_a_model_holds_for_the_extracted_one():
    supernet = convert(timm.create_model("resnet10t", num_classes=CLASSES).eval(), torch.zeros(1, 3, 64, 64))
    widths = some_widths(supernet.space)["arbitrary"]
    slim, x = supernet.extract(widths), torch.randn(2, 3, 64, 64)
    features = slim.forward_features(x)
    assert features.shape[1] == slim.num_features != supernet.model.num_features
    assert slim.forward_head(features, pre_logits=True).shape == (2, slim.head_hidden_size)
    _, maps = slim.forward_intermediates(x)
    assert [f.shape[1] for f in maps] == [info["num_chs"] for info in slim.feature_info]
    assert [info["num_chs"] for info in supernet.model.feature_info] == [64, 64, 128, 256, 512]
    slim.reset_classifier(3)
    assert slim(x).shape == (2, 3)
    assert supernet.extract().num_features == supernet.model.num_features


def test_frozen_parameters_stay_frozen(supernet, narrow):
    supernet.model.stem.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in supernet.extract(narrow).named_parameters()}
    assert flags == {name: name != "stem.weight" for name in flags}
    supernet(torch.randn(2, 3, 8, 8), narrow).sum().backward()
    assert supernet.model.stem.weight.grad is None
