"""The supernet: conversion, forward at widths, the `at` block, and extraction."""

import copy
import json

import pytest
import timm
import torch
from helpers.zoo import CLASSES, Plain, arbitrary_widths, assert_same, randomise, snapshot, some_widths
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_autoslim import convert, cost
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import NothingToSlimError, TraceError, WidthError
from timm_autoslim.supernet.supernet import _CACHED_SLICES

IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def supernet():
    return convert(randomise(Plain()).eval(), IMAGE)


@pytest.fixture
def images():
    return torch.randn(4, 3, 8, 8)


@pytest.fixture
def narrow(supernet):
    return supernet.space.from_dict({"stem": 5, "inner": 7})


# -- forward and at ---------------------------------------------------------------------------------------------------


def test_inside_a_block_the_supernet_and_its_model_are_the_subnet(supernet, images, narrow):
    plain = supernet.extract(narrow)
    expected = plain(images)
    with supernet.at(narrow):
        assert torch.equal(supernet(images), expected)
        assert torch.equal(supernet(images, narrow), expected)
        assert torch.equal(supernet.model(images), expected)
        assert supernet.model.stem.weight.shape[0] == 5
    assert supernet.model.stem.weight.shape[0] == 8
    assert torch.equal(supernet(images), supernet.model(images))


def test_a_block_inside_a_block_is_refused_and_the_outer_one_goes_on(supernet, images, narrow):
    with supernet.at(narrow):
        message = r"a `with supernet.at\(...\)` block is open already; leave it first"
        with pytest.raises(WidthError, match=message), supernet.at(narrow):
            pytest.fail("the block must not be entered")
        with pytest.raises(WidthError, match=r"other widths than those of the open `with supernet.at\(...\)` block"):
            supernet(images, supernet.space.min())
        with pytest.raises(WidthError, match=r"block is open, and its weights are sliced; leave it before extract\(\)"):
            supernet.extract(narrow)
        inside = supernet(images)
    assert torch.equal(inside, supernet(images, narrow))


def test_a_block_ends_when_its_body_raises(supernet, images, narrow):
    before = snapshot(supernet.model)
    with pytest.raises(ZeroDivisionError), supernet.at(narrow):
        raise ZeroDivisionError
    assert_same(before, snapshot(supernet.model))
    supernet(images, narrow)


def test_a_forward_that_raises_leaves_the_supernet_whole(supernet, narrow):
    before = snapshot(supernet.model)
    with pytest.raises(RuntimeError, match="channels"):
        supernet(torch.zeros(1, 4, 8, 8), narrow)
    assert_same(before, snapshot(supernet.model))
    supernet(IMAGE, narrow)


@pytest.mark.parametrize("method", ["forward", "at", "extract"])
def test_widths_of_another_model_are_refused(supernet, method):
    other = convert(Plain(16), IMAGE).space.max()
    calls = {
        "forward": lambda: supernet(IMAGE, other),
        "at": lambda: supernet.at(other).__enter__(),
        "extract": lambda: supernet.extract(other),
    }
    with pytest.raises(WidthError, match=r"got widths of another model \(2 groups, space \w+\)"):
        calls[method]()
    assert supernet._held is None


def test_more_subnets_than_are_remembered_stay_right(supernet, images):
    generator = torch.Generator().manual_seed(0)
    several = {arbitrary_widths(supernet.space, generator) for _ in range(3 * _CACHED_SLICES)}
    assert len(several) > _CACHED_SLICES
    first = {widths: supernet(images, widths) for widths in several}
    assert len(supernet._cache) == _CACHED_SLICES
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
    other = randomise(Plain()).eval()
    supernet.load_state_dict({f"model.{name}": value for name, value in other.state_dict().items()})
    assert torch.equal(supernet(images, narrow), convert(other, IMAGE)(images, narrow))


class Checkpointed(Plain):
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
def test_gradient_checkpointing_is_right_inside_a_block_and_refused_outside(reentrant, images):
    supernet = convert(randomise(Checkpointed(reentrant)).eval(), IMAGE)
    widths = supernet.space.from_channels({"inner": 3})  # only inside the part that runs again
    plain = Plain().eval()
    plain.load_state_dict(supernet.model.state_dict())
    reference = convert(plain, IMAGE)
    with reference.at(reference.space.from_channels({"inner": 3})):
        reference(images).square().mean().backward()
    with supernet.at(widths):
        supernet(images).square().mean().backward()
    for whole, piece in zip(reference.parameters(), supernet.parameters(), strict=True):
        assert torch.equal(whole.grad, piece.grad)
    if reentrant:  # the other kind is noticed by torch
        with pytest.raises(
            TraceError, match=r"the model: got reentrant gradient checkpointing.*needed: `with supernet.at"
        ):
            supernet(images, widths)
        with torch.no_grad():
            supernet(images, widths)
    else:
        with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
            supernet(images, widths).square().mean().backward()
    supernet(images, supernet.space.max()).square().mean().backward()


# -- extract ----------------------------------------------------------------------------------------------------------


def test_an_extracted_model_shares_nothing_with_the_supernet(supernet, images, narrow):
    plain = supernet.extract(narrow)
    before, out = snapshot(supernet.model), plain(images)
    with torch.no_grad():
        for tensor in plain.state_dict().values():
            tensor.zero_()
    assert_same(before, snapshot(supernet.model))
    again = supernet.extract(narrow)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.zero_()
    assert torch.equal(again(images), out)


def test_the_statistics_of_a_narrower_subnet_are_marked_as_not_its_own(supernet, narrow):
    for widths in (narrow, supernet.space.max().replaced("inner", 15)):
        plain = supernet.extract(widths)
        assert [m.num_batches_tracked.item() for m in plain.modules() if isinstance(m, nn.BatchNorm2d)] == [-43] * 3
    whole = supernet.extract()
    assert [m.num_batches_tracked.item() for m in whole.modules() if isinstance(m, nn.BatchNorm2d)] == [7, 7, 7]
    assert torch.equal(whole.bn.running_mean, supernet.model.bn.running_mean)


def test_the_spec_says_what_was_kept_and_goes_through_json(supernet, narrow):
    plain = supernet.extract(narrow)
    spec = plain.autoslim
    assert Spec.parse(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.format == 1
    assert spec.widths == {"stem": 5, "inner": 7}
    assert spec.sizes["inner.weight"] == (7, 5, None, None)
    assert spec.sizes["bn.running_var"] == (5,)
    assert spec.sizes["head.weight"] == (None, 5)
    assert "head.bias" not in spec.sizes
    for name, whole in supernet.model.state_dict().items():
        kept = spec.sizes.get(name, [None] * whole.dim())
        expected = [n if k is None else k for n, k in zip(whole.shape, kept, strict=True)]
        assert list(plain.state_dict()[name].shape) == expected
    assert spec.attributes["inner.out_channels"] == 7
    assert spec.attributes["head.in_features"] == 5
    assert supernet.extract().autoslim.sizes == {}
    assert supernet.extract().autoslim.attributes == {}


def test_an_extracted_model_says_itself_how_wide_it_is(supernet, narrow):
    expected = Plain()
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
    plain, x = supernet.extract(widths), torch.randn(2, 3, 64, 64)
    features = plain.forward_features(x)
    assert features.shape[1] == plain.num_features != supernet.model.num_features
    assert plain.forward_head(features, pre_logits=True).shape == (2, plain.head_hidden_size)
    _, maps = plain.forward_intermediates(x)
    assert [f.shape[1] for f in maps] == [info["num_chs"] for info in plain.feature_info]
    assert [info["num_chs"] for info in supernet.model.feature_info] == [64, 64, 128, 256, 512]
    plain.reset_classifier(3)
    assert plain(x).shape == (2, 3)
    assert supernet.extract().num_features == supernet.model.num_features


def test_frozen_parameters_stay_frozen(supernet, narrow):
    supernet.model.stem.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in supernet.extract(narrow).named_parameters()}
    assert flags == {name: name != "stem.weight" for name in flags}
    supernet(torch.randn(2, 3, 8, 8), narrow).sum().backward()
    assert supernet.model.stem.weight.grad is None


# -- convert ----------------------------------------------------------------------------------------------------------


def test_the_supernet_holds_the_model_itself_or_with_an_order_a_copy():
    model = randomise(Plain()).eval()
    before = snapshot(model)
    assert convert(model, IMAGE).model is model
    ordered = convert(model, IMAGE, order="l1")
    assert ordered.model is not model
    assert_same(before, snapshot(model))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in ordered.parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_numbers(dtype, images):
    supernet = convert(randomise(Plain()).to(dtype).eval(), IMAGE.to(dtype))
    widths = supernet.space.from_dict({"stem": 5, "inner": 7})
    out = supernet(images.to(dtype), widths)
    assert out.dtype == dtype
    assert torch.equal(out, supernet.extract(widths)(images.to(dtype)))


def test_without_an_example_the_models_configuration_or_a_usual_size_is_taken():
    model = timm.create_model("resnet10t", in_chans=1).eval()
    assert model.pretrained_cfg["input_size"] == (3, 176, 176)
    assert cost(convert(model)) == cost(convert(model, torch.zeros(1, 1, 176, 176)))
    assert cost(convert(Plain())) == cost(convert(Plain(), torch.zeros(1, 3, 224, 224)))
    only_small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(16 * 30 * 30, 10))
    assert cost(convert(only_small)) == cost(convert(only_small, torch.zeros(1, 3, 32, 32)))


def test_an_example_may_be_a_tuple_or_a_dict_of_inputs(images):
    class Two(Plain):
        def forward(self, x, shift):
            return super().forward(x + shift)

    model = randomise(Two()).eval()
    shift = torch.ones(4, 3, 8, 8)
    for example in ((IMAGE, IMAGE), {"x": IMAGE, "shift": IMAGE}):
        supernet = convert(model, example)
        widths = supernet.space.from_dict({"stem": 5, "inner": 7})
        with supernet.at(widths):
            out = supernet.model(images, shift)
        assert torch.equal(out, supernet.extract(widths)(images, shift))


def test_the_example_is_only_read_for_its_shape():
    example = torch.full((1, 3, 8, 8), float("nan"))
    convert(Plain(), example)
    convert(Plain(), example.to("meta"))
    convert(copy.deepcopy(Plain()).to("meta"), example)


def test_freezing_by_glob_keeps_all_channels_of_a_module_and_says_why():
    supernet = convert(Plain(), IMAGE, freeze="bn_inn*")
    assert supernet.space.names == ("stem",)
    assert supernet.graph.fixed["inner.weight", 0] == "frozen by the user (bn_inn*)"
    assert supernet.graph.slices((3,)).tensors["inner.weight"] == (None, ((0, 3),), None, None)
    with pytest.raises(WidthError, match=r"inner: its 16 channels are fixed: frozen by the user \(bn_inn\*\)"):
        supernet.space.from_channels({"inner": 3})
    with pytest.raises(WidthError, match="freeze='layer': the glob matches no module with weights; globs are matched"):
        convert(Plain(), IMAGE, freeze="layer")
    # of a convolution, those that enter as well as those that leave it
    with pytest.raises(NothingToSlimError, match=r"freeze=\['inner'\] leaves no channel that can be removed"):
        convert(Plain(), IMAGE, freeze="inner")


def test_the_base_is_known_for_a_timm_model_and_else_given(narrow):
    assert convert(Plain(), IMAGE, base="torchvision/x", base_args={"a": 1}).extract().autoslim.base_args == {"a": 1}
    assert convert(Plain(), IMAGE).extract().autoslim.base is None
    model = timm.create_model("resnet10t")
    assert convert(model, torch.zeros(1, 3, 64, 64)).extract().autoslim.base == "resnet10t"


class Wrong(nn.Module):
    """The third layer expects other channels than it gets."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.deep = nn.Sequential(nn.ReLU(), nn.Conv2d(9, 8, 3))

    def forward(self, x):
        return self.deep(self.stem(x))


class Reads(Plain):
    """Looks at its data."""

    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Halfway(Plain):
    """Raises on purpose."""

    def forward(self, x):
        self.stem(x)
        raise KeyError("mask")


def scripted():
    return nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.ReLU()), nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            Wrong,
            TraceError,
            r"^deep\.1: its forward raised RuntimeError in train\(\) mode on the meta device.*needed: a forw",
        ),
        (Reads, TraceError, r"^the model: its forward raised RuntimeError.*without reading data values"),
        (Halfway, TraceError, r"^stem: its forward raised KeyError in train\(\) mode on the meta device \('mask'\)"),
        (
            lambda: torch.jit.script(Plain()),
            TraceError,
            "^the model: got a scripted module; convert the model before scripting",
        ),
        (scripted, TraceError, "^1: got a scripted module; convert the model before scripting"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), TraceError, "^0: got a lazy module; run the model once on data"),
        (
            lambda: nn.Conv2d(3, 8, 3),
            NothingToSlimError,
            "^no channel of the model can be removed; what is in the way: an out",
        ),
        (nn.Sequential, NothingToSlimError, "what is in the way: it has no weights, and so no channels$"),
        (
            lambda: convert(Plain(), IMAGE),
            TraceError,
            r"^the model: got a Supernet; needed: the plain model; convert supernet\.",
        ),
    ],
    ids=["wrong", "reads", "halfway", "scripted", "part scripted", "lazy", "nothing", "no weights", "supernet"],
)
@pytest.mark.parametrize("example", [IMAGE, None], ids=["example", "no example"])
def test_a_model_that_cannot_be_converted_is_refused_and_left_alone(build, error, message, example):
    model = build()
    before = snapshot(model) if not isinstance(model, torch.jit.ScriptModule) and "Lazy" not in str(model) else None
    with pytest.raises(error, match=message):
        convert(model, example)
    if before is not None:
        assert_same(before, snapshot(model))


def test_what_is_no_module_is_refused():
    with pytest.raises(
        TraceError, match=r"the model: got a str; needed: an nn.Module, such as timm.create_model\('resnet18'\)"
    ):
        convert("resnet18")
