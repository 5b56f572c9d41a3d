"""`features_only=True` on slim models: the backbone that timm makes of the base, in its channels."""

import pytest
import timm
import torch
from helpers.exported import image, load, slim
from helpers.marks import slow_but
from helpers.specs import make_spec
from helpers.timm_contract import calibrated
from torch import nn

import timm_autoslim
from timm_autoslim.artifact.export import export
from timm_autoslim.artifact.features import choose_feature_cfg
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ArtifactError


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    model = slim("resnet10t")
    return model, export(model, tmp_path_factory.mktemp("resnet") / "out")


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    model = slim("torchvision/mobilenet_v2")
    return model, export(model, tmp_path_factory.mktemp("mobilenet") / "out")


def test_features_only(resnet):
    exported, folder = resnet
    features = load(folder, features_only=True)
    assert features.feature_info.channels() == [64, 64, 128, 256, 48]
    assert features.feature_info.reduction() == [2, 4, 8, 16, 32]
    with torch.no_grad():
        outputs = features(image(exported))
        expected = exported.forward_features(image(exported))
    assert [out.shape[1] for out in outputs] == features.feature_info.channels()
    assert torch.equal(outputs[-1], expected)


@pytest.mark.slow
def test_features_only_on_torchvision(mobilenet):
    exported, folder = mobilenet
    features = load(folder, features_only=True)
    assert features.feature_info.channels() == [16, 24, 32, 96, 200]
    with torch.no_grad():
        outputs = features(image(exported))
        expected = exported.features(image(exported))
    assert [out.shape[1] for out in outputs] == [16, 24, 32, 96, 200]
    assert [96 // out.shape[2] for out in outputs] == features.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert torch.equal(outputs[-1], expected)


@pytest.mark.parametrize("case", slow_but(["resnet"], ["resnet", "mobilenet"]))
def test_out_indices(case, request):
    exported, folder = request.getfixturevalue(case)
    features = load(folder, features_only=True, out_indices=(1, 3))
    channels = features.feature_info.channels()
    assert len(channels) == 2
    assert [out.shape[1] for out in features(image(exported))] == channels
    assert features.feature_info.reduction() == [4, 16]


def test_feature_extractor_of_choice(resnet):
    exported, folder = resnet
    for kind, choice in (("Getter", {"feature_cls": "getter"}), ("Graph", {"feature_cfg": {"feature_cls": "fx"}})):
        features = load(folder, features_only=True, **choice)
        assert type(features).__name__ == f"Feature{kind}Net"
        assert [out.shape[1] for out in features(image(exported))] == [64, 64, 128, 256, 48]
    two = load(folder, features_only=True, feature_cfg={"out_indices": (0, 2)})
    assert two.feature_info.channels() == [64, 128]


@pytest.mark.slow
def test_the_backbone_is_of_the_kind_that_the_base_makes(resnet, tmp_path):
    features = load(resnet[1], features_only=True)
    base = timm.create_model("resnet10t", features_only=True)
    assert type(features) is type(base)
    assert features.state_dict().keys() == base.state_dict().keys()
    supernet = timm_autoslim.convert(timm.create_model("test_efficientnet"), torch.zeros(1, 3, 64, 64))
    exported = calibrated(supernet.extract(supernet.space.uniform(0.5)))
    features = load(export(exported, tmp_path / "out"), features_only=True)  # its base has a class of its own
    features.set_grad_checkpointing()
    assert features.model.grad_checkpointing


@pytest.mark.slow
def test_what_only_the_backbone_of_a_base_takes_is_told(tmp_path):
    images = torch.zeros(1, 3, 64, 64)
    supernet = timm_autoslim.convert(timm.create_model("mobilenetv3_small_050", num_classes=3), images)
    model = calibrated(supernet.extract(supernet.space.uniform(0.5)))
    name = f"local-dir:{export(model, tmp_path / 'slim')}"
    with pytest.raises(ArtifactError, match=r"got output_stride, which MobileNetV3Features takes and MobileNetV3 does"):
        timm.create_model(name, pretrained=True, features_only=True, output_stride=16)
    with pytest.raises(ArtifactError, match=r"unexpected keyword argument 'nonsense'"):
        timm.create_model(name, pretrained=True, features_only=True, nonsense=16)


def test_features_need_feature_info():
    with pytest.raises(ArtifactError, match=r"features_only=True: got base 'resnet10t', which has no feature_info"):
        choose_feature_cfg(nn.Identity(), Spec(base="resnet10t"))


def test_features_default_to_the_indices_of_the_base():
    model = timm.create_model("autoslim", spec=make_spec("test_vit", {}), features_only=True)
    assert model.feature_info.out_indices == timm.create_model("test_vit", features_only=True).feature_info.out_indices
