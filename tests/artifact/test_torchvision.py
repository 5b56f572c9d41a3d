"""torchvision's models have what timm expects of a model."""

import pytest
import torch
from timm.models import FeatureInfo

from timm_autoslim.artifact.bases import create_base
from timm_autoslim.artifact.torchvision import describe_features, list_taps
from timm_autoslim.errors import ArtifactError


def test_torchvision_bases_are_described_as_timm_models():
    model = create_base("torchvision/mobilenet_v2", num_classes=7)
    cfg = model.pretrained_cfg
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (7, 1280, 1280)
    assert (cfg["first_conv"], cfg["classifier"], cfg["num_classes"]) == ("features.0.0", "classifier.1", 7)
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    info = FeatureInfo(model.feature_info, (0, 1, 2, 3, 4))
    assert info.reduction() == [2, 4, 8, 16, 32]
    assert info.channels() == [16, 24, 32, 96, 1280]


def test_classes_and_auxiliary_heads():
    assert create_base("torchvision/MNASNet", alpha=0.35).num_features == 1280
    cfg = create_base("torchvision/googlenet", init_weights=False).pretrained_cfg
    assert cfg["classifier"] == ("fc", "aux1.fc2", "aux2.fc2")


@pytest.mark.parametrize("in_chans", [1, 5])
def test_input_channels(in_chans):
    model = create_base("torchvision/squeezenet1_1", in_chans=in_chans).eval()
    assert model(torch.zeros(1, in_chans, 64, 64)).shape == (1, 1000)
    assert model.pretrained_cfg["input_size"] == (in_chans, 224, 224)


def test_what_a_model_cannot_take_is_refused():
    with pytest.raises(ArtifactError, match=r"in_chans: got 0, which torchvision/squeezenet1_1 cannot take"):
        create_base("torchvision/squeezenet1_1", in_chans=0)
    with pytest.raises(ArtifactError, match=r"num_classes: got -1; needed: an integer"):
        create_base("torchvision/squeezenet1_1", num_classes=-1)


def test_without_a_head_a_model_returns_features():
    model = create_base("torchvision/mobilenet_v2", num_classes=0).eval()
    assert model.num_classes == 0
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1280)


def test_taps_describe_a_model_without_a_forward():
    model = create_base("torchvision/squeezenet1_1")
    info, taps = model.feature_info, list_taps(model)
    model.feature_info = None
    describe_features(model, taps)
    assert model.feature_info == info
    for bad in ("text", [["features.3", 1]], [["nowhere", 1, 2]], [["features.3", True, 2]], [["features.3", 1, 0]]):
        with pytest.raises(ArtifactError, match=r"taps: got .*; needed: lists of a module of the model"):
            describe_features(model, bad)
