"""convert: its arguments, the examples that it tries, the base that it notes, and what it refuses."""

import copy

import pytest
import timm
import torch
from helpers.comparisons import assert_same, snapshot
from helpers.models import TwoGroups, randomise
from torch import nn

from timm_autoslim import convert, cost
from timm_autoslim.errors import NothingToSlimError, TraceError, WidthError

IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def images():
    return torch.randn(4, 3, 8, 8)


def test_the_supernet_holds_the_model_itself_or_with_an_order_a_copy():
    model = randomise(TwoGroups()).eval()
    before = snapshot(model)
    assert convert(model, IMAGE).model is model
    ordered = convert(model, IMAGE, order="l1")
    assert ordered.model is not model
    assert_same(before, snapshot(model))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in ordered.parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types_of_numbers_are_converted(dtype, images):
    supernet = convert(randomise(TwoGroups()).to(dtype).eval(), IMAGE.to(dtype))
    widths = supernet.space.from_dict({"stem": 5, "inner": 7})
    out = supernet(images.to(dtype), widths)
    assert out.dtype == dtype
    assert torch.equal(out, supernet.extract(widths)(images.to(dtype)))


@pytest.mark.slow
def test_without_an_example_the_models_configuration_or_a_usual_size_is_taken():
    model = timm.create_model("resnet10t", in_chans=1).eval()
    assert model.pretrained_cfg["input_size"] == (3, 176, 176)
    assert cost(convert(model)) == cost(convert(model, torch.zeros(1, 1, 176, 176)))
    assert cost(convert(TwoGroups())) == cost(convert(TwoGroups(), torch.zeros(1, 3, 224, 224)))
    only_small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(16 * 30 * 30, 10))
    assert cost(convert(only_small)) == cost(convert(only_small, torch.zeros(1, 3, 32, 32)))


def test_without_an_example_the_size_that_the_model_was_built_for_is_tried_first():
    model = timm.create_model("test_vit", img_size=96, depth=1).eval()
    assert model.pretrained_cfg["input_size"] == (3, 160, 160)
    assert cost(convert(model)) == cost(convert(model, torch.zeros(1, 3, 96, 96)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_an_example_the_images_have_the_type_of_the_weights(dtype):
    example = convert(TwoGroups().to(dtype)).example()
    assert (example.dtype, tuple(example.shape)) == (dtype, (1, 3, 224, 224))
    assert example.device.type == "meta"


def test_outputs_are_features_where_the_model_has_no_classes():
    model, image = timm.create_model("resnet10t", num_classes=0).eval(), torch.zeros(1, 3, 64, 64)
    free, kept = convert(model, image), convert(model, image, keep_output=True)
    assert free.extract(free.space.min())(image).shape[1] < 512
    assert kept.extract(kept.space.min())(image).shape[1] == 512
    assert "head" in convert(TwoGroups(), IMAGE, keep_output=False).space.names


def test_an_example_may_be_a_tuple_or_a_dict_of_inputs(images):
    class Two(TwoGroups):
        def forward(self, x, shift):
            return super().forward(x + shift)

    model = randomise(Two()).eval()
    shift = torch.ones(4, 3, 8, 8)
    for example in ((IMAGE, IMAGE), {"x": IMAGE, "shift": IMAGE}):
        supernet = convert(model, example)
        widths = supernet.space.from_dict({"stem": 5, "inner": 7})
        with supernet.at(widths):
            out = supernet(images, shift)
        assert torch.equal(out, supernet.extract(widths)(images, shift))


def test_the_example_is_only_read_for_its_shape():
    example = torch.full((1, 3, 8, 8), float("nan"))
    convert(TwoGroups(), example)
    convert(TwoGroups(), example.to("meta"))
    convert(copy.deepcopy(TwoGroups()).to("meta"), example)


def test_freezing_by_glob_keeps_all_channels_of_a_module_and_says_why():
    supernet = convert(TwoGroups(), IMAGE, freeze="bn_inn*")
    assert supernet.space.names == ("stem",)
    assert supernet.graph.fixed["inner.weight", 0] == "frozen by the user (bn_inn*)"
    assert supernet.graph.slices((3,)).tensors["inner.weight"] == (None, ((0, 3),), None, None)
    with pytest.raises(
        WidthError, match=r"inner: got a module whose 16 channels are fixed \(frozen by the user \(bn_inn\*\)\)"
    ):
        supernet.space.from_channels({"inner": 3})
    with pytest.raises(
        WidthError,
        match=r"freeze: got a glob \('layer'\) that matches no module with weights; needed: globs of module",
    ):
        convert(TwoGroups(), IMAGE, freeze="layer")
    with pytest.raises(WidthError, match=r"freeze: got a glob \('bn_iner'\) .*; the closest are \['bn_inner'"):
        convert(TwoGroups(), IMAGE, freeze="bn_iner")
    # of a convolution, those that enter as well as those that leave it
    with pytest.raises(
        NothingToSlimError,
        match=r"freeze: got \['inner'\], which freezes all channels; needed: channels that can be removed; freeze",
    ):
        convert(TwoGroups(), IMAGE, freeze="inner")


def test_freezing_a_module_freezes_all_modules_in_it():
    model, image = timm.create_model("resnet10t"), torch.zeros(1, 3, 64, 64)
    supernet = convert(model, image, freeze="layer1")
    assert supernet.space.names == convert(model, image, freeze="layer1.*").space.names
    assert supernet.graph.fixed["layer1.0.conv1.weight", 0] == "frozen by the user (layer1)"


def test_a_timm_model_names_its_base_and_any_other_gets_it_from_the_user():
    spec = convert(TwoGroups(), IMAGE, base="torchvision/x", base_args={"a": 1}).extract().autoslim
    assert (spec.base, spec.base_args) == ("torchvision/x", {"a": 1})
    assert convert(TwoGroups(), IMAGE).extract().autoslim.base is None
    model = timm.create_model("resnet10t")
    assert convert(model, torch.zeros(1, 3, 64, 64)).extract().autoslim.base == "resnet10t"


def test_a_slim_model_is_converted_with_the_base_of_the_first():
    supernet = convert(TwoGroups(), IMAGE, base="torchvision/x", base_args={"a": 1})
    slim = supernet.extract(supernet.space.from_dict({"stem": 5, "inner": 7}))
    again = convert(slim, IMAGE, base_args={"b": 2})
    spec = again.extract(again.space.from_dict({"stem": 3, "inner": 7})).autoslim
    assert (spec.base, spec.base_args) == ("torchvision/x", {"a": 1, "b": 2})
    assert spec.sizes["inner.weight"] == (7, 3, None, None)


class Wrong(nn.Module):
    """The third layer expects other channels than it gets."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.deep = nn.Sequential(nn.ReLU(), nn.Conv2d(9, 8, 3))

    def forward(self, x):
        return self.deep(self.stem(x))


class Reads(TwoGroups):
    """Looks at its data."""

    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Halfway(TwoGroups):
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
        (
            Halfway,
            TraceError,
            r"^stem: its forward raised KeyError in train\(\) mode on the meta device at .*test_convert.py:\d+, "
            r"`raise KeyError\(.mask.\)` \('mask'\)",
        ),
        (
            lambda: torch.jit.script(TwoGroups()),
            TraceError,
            "^the model: got a scripted module; .*convert the model before scripting",
        ),
        (scripted, TraceError, "^1: got a scripted module; .*convert the model before scripting"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), TraceError, "^0: got a lazy module; .*run the model once on data"),
        (
            lambda: nn.Conv2d(3, 8, 3),
            NothingToSlimError,
            "^no channel of the model can be removed; what is in the way: an out",
        ),
        (nn.Sequential, NothingToSlimError, "what is in the way: it has no weights, and so no channels$"),
        (
            lambda: convert(TwoGroups(), IMAGE),
            TraceError,
            r"^the model: got a Supernet; needed: the original model; convert supernet\.",
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
