"""Bases, recipes and timm's entrypoint. `test_artifact.py` takes its hand-made recipes from here."""

import copy

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models import FeatureInfo
from torch import nn

import timm_autoslim.registry as registry
from timm_autoslim.errors import ArtifactError
from timm_autoslim.recipe import RECIPE_KEYS
from timm_autoslim.registry import apply_recipe, build_slimmed, check_recipe, create_base

# the out and in sizes of every layer of resnet10t that its last stage's and one inner width of 48 and 40 concern
RESNET = {
    "layer1.0.conv1": (40, None),
    "layer1.0.bn1": (40, None),
    "layer1.0.conv2": (None, 40),
    "layer4.0.conv2": (48, None),
    "layer4.0.bn2": (48, None),
    "layer4.0.downsample.1": (48, None),
    "layer4.0.downsample.2": (48, None),
    "fc": (None, 48),
}
RESNET_ATTRIBUTES = {"num_features": 48, "head_hidden_size": 48, "feature_info.4.num_chs": 48}


def make_recipe(base, narrow, attributes=None, **base_args):
    """A recipe written by hand: by module, the out and in sizes that are kept."""
    model = create_base(base, **base_args)
    sizes, values = {}, dict(attributes or {})
    for name, (out, fan_in) in narrow.items():
        module = model.get_submodule(name)
        norm = isinstance(module, nn.BatchNorm2d)
        for leaf, tensor in (*module.named_parameters(), *module.named_buffers()):
            kept = [out, fan_in, None, None][: tensor.ndim]
            if any(kept):
                sizes[f"{name}.{leaf}"] = kept
        labels = ("num_features",) if norm else ("out_channels", "in_channels", "out_features", "in_features")
        for label in labels:
            size = out if label.startswith("out") or norm else fan_in
            if size is not None and hasattr(module, label):
                values[f"{name}.{label}"] = size
    widths = {name: out for name, (out, _) in narrow.items() if out and not name.endswith("bn1")}
    return {
        "format": 1, "base": base, "base_args": base_args, "sizes": sizes, "attributes": values, "widths": widths
    }  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return make_recipe("resnet10t", RESNET, RESNET_ATTRIBUTES)


def changed(recipe, path, value):
    copied = copy.deepcopy(recipe)
    *parents, leaf = path
    target = copied
    for part in parents:
        target = target[part]
    target[leaf] = value
    return copied


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- bases


def test_create_base_makes_timm_models_without_weights():
    torch.manual_seed(0)
    one = create_base("resnet10t", num_classes=5)
    torch.manual_seed(0)
    assert same(state(one), state(timm.create_model("resnet10t", num_classes=5)))
    assert type(create_base("resnet10t.c3_in1k")) is type(one)


@pytest.mark.parametrize(
    "name", ["nothing", "torchvision/nothing", "torchvision/ResNet50_Weights", "autoslim", "", "a/b"]
)
def test_unknown_bases_are_named(name):
    with pytest.raises(ArtifactError, match=r"base .* is unknown: needed a name of"):
        create_base(name)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:somewhere", "torchvision/nn"])
def test_a_base_is_never_a_place_to_load_from(name):
    with pytest.raises(ArtifactError, match="is unknown"):
        create_base(name)


def test_arguments_that_a_constructor_refuses_are_named():
    with pytest.raises(ArtifactError, match=r"base 'resnet10t' cannot be created with .*'nonsense': 1.*TypeError"):
        create_base("resnet10t", nonsense=1)
    with pytest.raises(ArtifactError, match=r"base 'torchvision/resnet18' cannot be created with .*drop_rate"):
        create_base("torchvision/resnet18", drop_rate=0.1)


def test_torchvision_bases_are_dressed_as_timm_models():
    model = create_base("torchvision/mobilenet_v2", num_classes=7)
    cfg = model.pretrained_cfg
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (7, 1280, 1280)
    assert (cfg["first_conv"], cfg["classifier"], cfg["num_classes"]) == ("features.0.0", "classifier.1", 7)
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    info = FeatureInfo(model.feature_info, (0, 1, 2, 3, 4))
    assert info.reduction() == [2, 4, 8, 16, 32]
    assert info.channels() == [16, 24, 32, 96, 1280]


def test_torchvision_classes_and_auxiliary_heads():
    assert create_base("torchvision/MNASNet", alpha=0.35).num_features == 1280
    cfg = create_base("torchvision/googlenet", init_weights=False).pretrained_cfg
    assert cfg["classifier"] == ("fc", "aux1.fc2", "aux2.fc2")


@pytest.mark.parametrize("in_chans", [1, 5])
def test_torchvision_input_channels(in_chans):
    model = create_base("torchvision/squeezenet1_1", in_chans=in_chans).eval()
    assert model(torch.zeros(1, in_chans, 64, 64)).shape == (1, 1000)
    assert model.pretrained_cfg["input_size"] == (in_chans, 224, 224)


def test_torchvision_refuses_what_it_cannot_adapt():
    with pytest.raises(ArtifactError, match=r"in_chans=0: torchvision/squeezenet1_1 cannot take it"):
        create_base("torchvision/squeezenet1_1", in_chans=0)
    with pytest.raises(ArtifactError, match=r"num_classes=-1: needed an integer"):
        create_base("torchvision/squeezenet1_1", num_classes=-1)


def test_torchvision_without_a_head_returns_features():
    model = create_base("torchvision/mobilenet_v2", num_classes=0).eval()
    assert model.num_classes == 0
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1280)


# ---- recipes


def test_apply_recipe_keeps_prefixes(recipe):
    base = create_base("resnet10t").eval()
    full = state(base)
    slim = apply_recipe(base, recipe)
    assert slim is base
    assert slim.autoslim == recipe
    assert slim.autoslim is not recipe
    for name, tensor in slim.state_dict().items():
        kept = recipe["sizes"].get(name, [None] * tensor.ndim)
        assert torch.equal(tensor, full[name][tuple(slice(size) for size in kept)]), name
    assert isinstance(slim.layer4[0].conv2.weight, nn.Parameter)
    assert slim.layer4[0].conv2.weight.requires_grad
    assert slim.feature_info[4]["num_chs"] == slim.num_features == slim.fc.in_features == 48
    assert slim(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.table = torch.arange(8.0)
        self.norm = nn.LayerNorm(8)
        self.splits = [4, 4]
        self.scale = 0.5
        self.flag = True


def plain_recipe(sizes=None, attributes=None):
    return {
        "format": 1, "base": None, "base_args": {}, "sizes": sizes or {}, "attributes": attributes or {}, "widths": {}
    }  # fmt: skip


@pytest.mark.parametrize("names", [["first.weight"], ["second.weight"], ["first.weight", "second.weight"]])
def test_tied_parameters_stay_tied(names):
    model = apply_recipe(Tied(), plain_recipe({name: [3, None] for name in names}))
    assert model.first.weight is model.second.weight
    assert model.first.weight.shape == (3, 8)


def test_plain_tensors_tuples_lists_and_floats():
    attributes = {"norm.normalized_shape": [5], "splits": [2, 3], "scale": 0.75}
    model = apply_recipe(Tied(), plain_recipe({"table": [5]}, attributes))
    assert model.table.tolist() == [0, 1, 2, 3, 4]
    assert (model.norm.normalized_shape, model.splits, model.scale) == ((5,), [2, 3], 0.75)
    model = apply_recipe(Tied(), plain_recipe({}, {"norm.normalized_shape.0": 6, "splits.1": 1}))
    assert (model.norm.normalized_shape, model.splits) == ((6,), [4, 1])


BAD_SHAPES = [
    ({"first.weight": [9, None]}, {}, r"recipe 'sizes.first.weight': got \[9, None\], needed .* in \(8, 8\)"),
    ({"first.weight": [0, None]}, {}, "integer from 1"),
    ({"first.weight": [-1, None]}, {}, "integer from 1"),
    ({"first.weight": [True, None]}, {}, "integer from 1"),
    ({"first.weight": [2.0, None]}, {}, "integer from 1"),
    ({"first.weight": [[[0, 9]], None]}, {}, "or runs within it"),
    ({"first.weight": [[[4, 2], [2, 2]], None]}, {}, "or runs within it"),
    ({"first.weight": [[[0, 2], [1, 2]], None]}, {}, "or runs within it"),
    ({"first.weight": [[[-1, 2]], None]}, {}, "or runs within it"),
    ({"first.weight": [[[0, 0]], None]}, {}, "or runs within it"),
    ({"first.weight": [[[0, 2, 1]], None]}, {}, "or runs within it"),
    ({"first.weight": [[], None]}, {}, "or runs within it"),
    ({"first.weight": [[[0, True]], None]}, {}, "or runs within it"),
    ({"first.weight": [2]}, {}, "a list of 2 sizes"),
    ({"first.weight": "22"}, {}, "a list of 2 sizes"),
    ({"first.wait": [2, None]}, {}, "a tensor of Tied, which has none of this name"),
    ({"scale": [2]}, {}, "which has none of this name"),
    ({"first.weight": [2, None], "second.weight": [3, None]}, {}, "the sizes of first.weight, the same tensor"),
    ({}, {"first.in_features": 9}, r"recipe 'attributes.first.in_features': got 9, needed an integer from 1 to 8"),
    ({}, {"first.in_features": 0}, "from 1 to 8"),
    ({}, {"first.in_features": True}, "from 1 to 8"),
    ({}, {"first.in_features": 4.0}, "from 1 to 8"),
    ({}, {"first.in_features": [4]}, "from 1 to 8"),
    ({}, {"first.new": 4}, "which has none under this path"),
    ({}, {"flag": 1}, "which has none under this path"),
    ({}, {"training": False}, "which has none under this path"),
    ({}, {"_modules.first.in_features": 4}, "which has none under this path"),
    ({}, {"first.__class__": 4}, "which has none under this path"),
    ({}, {"table": 4}, "which has none under this path"),
    ({}, {"splits.2": 1}, "which has none under this path"),
    ({}, {"splits.-1": 1}, "which has none under this path"),
    ({}, {"": 1}, "which has none under this path"),
    ({}, {"splits": [1]}, r"2 positive integers, none above \(4, 4\)"),
    ({}, {"splits": [1, 5]}, "none above"),
    ({}, {"norm.normalized_shape": 4}, "none above"),
    ({}, {"scale": -0.5}, "finite number of the sign of 0.5"),
    ({}, {"scale": float("inf")}, "finite number"),
    ({}, {"scale": 1}, "finite number"),
]


@pytest.mark.parametrize(("sizes", "attributes", "message"), BAD_SHAPES)
def test_what_does_not_fit_the_base_is_named_and_changes_nothing(sizes, attributes, message):
    model = Tied()
    before, weight = state(model), model.first.weight
    good = plain_recipe({"table": [4], **sizes}, {"second.in_features": 4, **attributes})
    with pytest.raises(ArtifactError, match=message):
        apply_recipe(model, good)
    assert same(before, state(model))
    assert model.first.weight is weight
    assert len(model.table) == 8
    assert model.second.in_features == 8
    assert not hasattr(model, "autoslim")


BAD_RECIPES = [
    (["format"], 2, r"recipe 'format': got 2, needed 1 \(a newer one needs a newer timm-autoslim\)"),
    (["format"], True, "recipe 'format'"),
    (["base"], 7, "recipe 'base': got 7, needed a name"),
    (["extra"], 1, "a mapping with exactly format, base, base_args, sizes, attributes, widths"),
    (["sizes"], [], "recipe 'sizes'.*a mapping from names"),
    (["attributes"], {1: 2}, "recipe 'attributes'.*a mapping from names"),
    (["widths", "layer1.0.conv1"], 0, "recipe 'widths.layer1.0.conv1': got 0, needed a positive integer"),
    (["base_args", "pretrained"], True, "recipe 'base_args.pretrained': got True, needed only arguments that shape"),
    (["base_args", "checkpoint_path"], "x", "recipe 'base_args.checkpoint_path'"),
    (["base_args", "weights"], "DEFAULT", "recipe 'base_args.weights'"),
    (["base_args", "num_classes"], 10**9, "recipe 'base_args.num_classes': .* a number of at most 1000000"),
    (["base_args", "num_classes"], "ten", "recipe 'base_args.num_classes': .* needed an integer, 0 for no head"),
    (["base_args", "x"], float("nan"), "a number of at most"),
    (["base_args", "x"], object(), "plain data"),
    (["base_args", "x"], [[[[[[[[[[]]]]]]]]]], "plain data of at most 1000 items and 8 levels"),
    (["base_args", "x"], {(1, 2): 3}, "a text key"),
    (["base_args", "x"], 1, "cannot be created with"),
    (["base_args", "name"], "x", "cannot be created with"),
    (["base_args", "function"], "x", "cannot be created with"),
    (["base_args", "model_name"], "x", "cannot be created with"),
    (["base"], "resnet10t.nonsense", "Invalid pretrained tag"),
    (["base"], None, "recipe 'base': got None, needed the name that creates the base; export with base="),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_RECIPES)
def test_malformed_recipes_are_refused(recipe, path, value, message):
    with pytest.raises(ArtifactError, match=message):
        build_slimmed(changed(recipe, path, value))


@pytest.mark.parametrize("recipe", [None, [], "text", {}])
def test_a_recipe_is_a_mapping(recipe):
    with pytest.raises(ArtifactError, match="a mapping with exactly"):
        check_recipe(recipe)


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3)
JUNK = st.recursive(ATOMS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3))
NAMES = st.sampled_from(
    ["first.weight", "second.weight", "table", "norm.weight", "first.in_features", "splits", "splits.0", "scale",
     "flag", "norm.normalized_shape", "norm.normalized_shape.0", "_modules", "forward", "first",
     "training", "..", "first."]
) | st.text(max_size=8)  # fmt: skip
SIZES = st.lists(st.none() | st.integers(-2, 10), max_size=3) | JUNK
VALUES = st.integers(-2, 10) | st.lists(st.integers(-1, 9), max_size=3) | JUNK


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(NAMES, SIZES, max_size=3), st.dictionaries(NAMES, VALUES, max_size=3), JUNK, st.integers(0, 9))
def test_hostile_recipes_either_fit_or_raise_only_artifact_errors(sizes, attributes, junk, where):
    model = Tied()
    before, numbers = state(model), dict(vars(model.first), **vars(model.norm))
    bad = plain_recipe(sizes, attributes)
    if where < len(RECIPE_KEYS) and where != 0:
        bad[RECIPE_KEYS[where]] = junk
    try:
        apply_recipe(model, bad)
    except ArtifactError:
        assert same(before, state(model))
        assert numbers == dict(vars(model.first), **vars(model.norm))
    else:
        for name, tensor in model.state_dict().items():
            assert all(0 < new <= old for new, old in zip(tensor.shape, before[name].shape, strict=True))
        assert model.first.weight is model.second.weight


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(["num_classes", "in_chans", "global_pool", "drop_rate", "x"]), JUNK, max_size=2),
    JUNK,
)
def test_hostile_bases_raise_only_artifact_errors(base_args, base):
    bad = {**plain_recipe(), "base": base, "base_args": base_args}
    with pytest.raises(ArtifactError):
        build_slimmed(bad)
    with pytest.raises(ArtifactError):
        build_slimmed({**bad, "base": "torchvision/alexnet", "base_args": {**base_args, "x": 1}})


# ---- the entrypoint


def test_the_entrypoint_is_registered_and_says_what_it_is():
    assert timm.is_model("autoslim")
    with pytest.raises(ArtifactError, match=r"timm.create_model\('local-dir:FOLDER', pretrained=True\)"):
        timm.create_model("autoslim")


def test_the_entrypoint_builds_a_recipe_without_a_folder(recipe):
    model = timm.create_model("autoslim", recipe=recipe, num_classes=7)
    assert type(model) is type(timm.create_model("resnet10t"))
    assert model.fc.weight.shape == (7, 48)
    assert model.autoslim == recipe
    assert model.pretrained_cfg["first_conv"] == "conv1.0"
    assert "url" not in model.pretrained_cfg
    assert "hf_hub_id" not in model.pretrained_cfg
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("autoslim", recipe=recipe, pretrained=True)


@pytest.mark.parametrize("native", [None, 0, 12])
@pytest.mark.parametrize("wanted", [0, 7])
def test_heads_come_and_go_whatever_the_recipe_had(recipe, native, wanted):
    if native is not None:
        recipe = changed(recipe, ["base_args", "num_classes"], native)
    if native == 0:
        recipe["sizes"].pop("fc.weight")
        recipe["attributes"].pop("fc.in_features")
    model = build_slimmed(recipe, num_classes=wanted).eval()
    assert model.num_classes == wanted
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, wanted or 48)


def test_pooling_can_change(recipe):
    model = build_slimmed(recipe, global_pool="catavgmax").eval()
    assert model.fc.weight.shape == (1000, 96)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_torchvision_heads_are_refused_by_name():
    recipe = make_recipe("torchvision/squeezenet1_1", {}, num_classes=0)
    with pytest.raises(ArtifactError, match=r"cannot take num_classes=3 without a head"):
        build_slimmed(recipe, num_classes=3)
    with pytest.raises(ArtifactError, match=r"cannot take global_pool='max'"):
        build_slimmed(recipe, global_pool="max")


def test_fixed_image_sizes_of_the_recipe_win_over_the_data_settings():
    recipe = make_recipe("test_vit", {}, img_size=96)
    model = timm.create_model("autoslim", recipe=recipe)
    assert model.pos_embed.shape[1] == (96 // 16) ** 2 + 1
    model = timm.create_model("autoslim", recipe=recipe, img_size=64)
    assert model.pos_embed.shape[1] == (64 // 16) ** 2 + 1


def test_features_need_feature_info():
    with pytest.raises(ArtifactError, match=r"features_only=True: base .* has no feature_info"):
        registry._feature_cfg(nn.Identity(), {"base": "resnet10t", "base_args": {}})


def test_features_default_to_the_indices_of_the_base():
    model = timm.create_model("autoslim", recipe=make_recipe("test_vit", {}), features_only=True)
    assert model.feature_info.out_indices == timm.create_model("test_vit", features_only=True).feature_info.out_indices
