"""Recipes: what fits a base is applied, what does not is named and changes nothing."""

import pytest
import torch
from helpers.comparisons import same, state
from helpers.specs import RESNET, RESNET_ATTRIBUTES, changed, make_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from timm_autoslim.artifact.apply import apply_recipe
from timm_autoslim.artifact.load import build_slimmed, create_base
from timm_autoslim.artifact.spec import RECIPE_KEYS, check_recipe
from timm_autoslim.errors import ArtifactError


@pytest.fixture(scope="module")
def recipe():
    return make_recipe("resnet10t", RESNET, RESNET_ATTRIBUTES)


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
        self.factor, self.drop = 3.0, 0.5
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
    attributes = {"norm.normalized_shape": [5], "splits": [2, 3], "scale": 3**-0.5}
    model = apply_recipe(Tied(), plain_recipe({"table": [5]}, attributes))
    assert model.table.tolist() == [0, 1, 2, 3, 4]
    assert (model.norm.normalized_shape, model.splits, model.scale) == ((5,), [2, 3], 3**-0.5)
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
    *(
        ({}, {"scale": value}, r"n \*\* -0.5 of a head of n channels, where the base has such a scale of more, not 0.5")
        for value in (-0.5, float("inf"), float("nan"), 1, 0.0, 1e-200, 1e5, 1.5, 0.6, 5**-0.5)
    ),
    ({}, {"factor": 2.0}, "not 3.0"),  # no scale of attention scores
    ({}, {"drop": 1.0}, "not 0.5"),
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
