"""Bases, recipes and timm's entrypoint. `test_artifact.py` takes its hand-made recipes from here."""

import pytest
import timm
import torch
from helpers.comparisons import same, state
from helpers.specs import RESNET, RESNET_ATTRIBUTES, changed, make_recipe
from timm.models import FeatureInfo
from torch import nn

from timm_autoslim.artifact import features as backbones
from timm_autoslim.artifact.load import build_slimmed, create_base
from timm_autoslim.errors import ArgumentError, ArtifactError


@pytest.fixture(scope="module")
def recipe():
    return make_recipe("resnet10t", RESNET, RESNET_ATTRIBUTES)


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
    with pytest.raises(ArgumentError, match=r"base 'resnet10t' cannot be created with .*'nonsense': 1.*TypeError"):
        create_base("resnet10t", nonsense=1)
    with pytest.raises(TypeError):  # as from the base, for programs that try
        timm.create_model("autoslim", recipe=make_recipe("resnet10t", {}), nonsense=1)
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
        backbones.feature_cfg(nn.Identity(), {"base": "resnet10t", "base_args": {}})


def test_features_default_to_the_indices_of_the_base():
    model = timm.create_model("autoslim", recipe=make_recipe("test_vit", {}), features_only=True)
    assert model.feature_info.out_indices == timm.create_model("test_vit", features_only=True).feature_info.out_indices
