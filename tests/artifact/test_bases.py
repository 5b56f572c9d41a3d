"""Bases by name: timm's and torchvision's, without weights; the place of a file is no name."""

import pytest
import timm
import torch
from helpers.comparisons import same, state
from torch import nn

from timm_autoslim.artifact.bases import create_base, create_meta_base, find_weight_filter, get_base_settings
from timm_autoslim.errors import ArgumentError, ArtifactError


def test_timm_models_are_created_without_weights():
    torch.manual_seed(0)
    model = create_base("resnet10t", num_classes=5)
    torch.manual_seed(0)
    assert same(state(model), state(timm.create_model("resnet10t", num_classes=5)))
    assert type(create_base("resnet10t.c3_in1k")) is type(model)


@pytest.mark.parametrize(
    "name", ["nothing", "torchvision/nothing", "torchvision/ResNet50_Weights", "autoslim", "", "a/b"]
)
def test_unknown_bases_are_named(name):
    with pytest.raises(ArtifactError, match=r"base: got '.*', which is unknown; needed: a name of"):
        create_base(name)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:somewhere", "torchvision/nn"])
def test_a_base_is_never_a_place_to_load_from(name):
    with pytest.raises(ArtifactError, match="is unknown"):
        create_base(name)


def test_arguments_that_a_constructor_refuses_are_named():
    with pytest.raises(ArgumentError, match=r"base 'resnet10t': cannot be created with .*'nonsense': 1.*TypeError"):
        create_base("resnet10t", nonsense=1)
    with pytest.raises(ArtifactError, match=r"base 'torchvision/resnet18': cannot be created with .*drop_rate"):
        create_base("torchvision/resnet18", drop_rate=0.1)


def test_bases_on_the_meta_device_hold_no_data_where_that_works():
    assert {p.device.type for p in create_meta_base("resnet10t").parameters()} == {"meta"}
    name = "torchvision/regnet_y_400mf"  # whose constructor reads values
    with pytest.raises(ArtifactError, match="meta"), torch.device("meta"):
        create_base(name)
    assert {p.device.type for p in create_meta_base(name).parameters()} == {"cpu"}


def test_settings_of_a_base_name_no_weights():
    settings = get_base_settings("resnet10t.c3_in1k").to_dict()
    assert settings["first_conv"] == "conv1.0"
    assert not {"url", "hf_hub_id", "file", "source", "architecture"} & set(settings)
    assert get_base_settings("torchvision/resnet18").num_classes == 1000


def test_the_weight_filter_is_the_one_that_timm_passes_to_its_builder():
    assert find_weight_filter("resnet18") is None
    assert find_weight_filter("torchvision/resnet18") is None
    for name, arguments in (("vit_base_patch16_siglip_224", {}), ("flexivit_small", {"interpolation": "bilinear"})):
        function = find_weight_filter(name)
        assert getattr(function, "keywords", {}).items() >= arguments.items()
        assert getattr(function, "func", function).__name__ == "checkpoint_filter_fn"
    assert find_weight_filter("crossvit_tiny_240").__name__ == "pretrained_filter_fn"
    assert isinstance(timm.create_model("test_vit"), nn.Module)
    assert timm.create_model("test_vit").pos_embed.shape[1] == 101  # timm itself builds on
