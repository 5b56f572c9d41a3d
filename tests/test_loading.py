"""timm's arguments on a model that is loaded from an exported folder."""

import logging

import pytest
import timm
import torch
from exported import image, load, slim
from test_registry import same, state

from timm_autoslim.artifact import export


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    model = slim("resnet10t")
    return model, export(model, tmp_path_factory.mktemp("resnet") / "out")


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    model = slim("torchvision/mobilenet_v2")
    return model, export(model, tmp_path_factory.mktemp("mobilenet") / "out")


@pytest.mark.parametrize("case", ["resnet", "mobilenet"])
def test_num_classes(case, request):
    plain, folder = request.getfixturevalue(case)
    seven, none = load(folder, num_classes=7), load(folder, num_classes=0)
    names = set(plain.state_dict())
    head = plain.pretrained_cfg["classifier"]
    kept = {name for name in names if not name.startswith(f"{head}.")}
    for model in (seven, none):
        assert all(torch.equal(plain.state_dict()[name], model.state_dict()[name]) for name in kept)
    assert (seven.num_classes, none.num_classes) == (7, 0)
    assert seven(image(plain)).shape == (1, 7)
    assert none(image(plain)).shape == (1, plain.num_features)
    assert set(none.state_dict()) == kept


@pytest.mark.parametrize("case", ["resnet", "mobilenet"])
def test_in_chans(case, request):
    plain, folder = request.getfixturevalue(case)
    grey = load(folder, in_chans=1)
    stem = f"{plain.pretrained_cfg['first_conv']}.weight"
    expected = plain.state_dict()[stem].sum(1, keepdim=True)
    torch.testing.assert_close(grey.state_dict()[stem], expected, rtol=0, atol=1e-6)
    assert grey(torch.randn(1, 1, 64, 64)).shape == (1, 1000)


def test_features_only(resnet):
    plain, folder = resnet
    features = load(folder, features_only=True)
    assert features.feature_info.channels() == [64, 64, 128, 256, 48]
    assert features.feature_info.reduction() == [2, 4, 8, 16, 32]
    with torch.no_grad():
        outputs = features(image(plain))
        expected = plain.forward_features(image(plain))
    assert [out.shape[1] for out in outputs] == features.feature_info.channels()
    assert torch.equal(outputs[-1], expected)


def test_features_only_on_torchvision(mobilenet):
    plain, folder = mobilenet
    features = load(folder, features_only=True)
    assert features.feature_info.channels() == [16, 24, 32, 96, 200]
    with torch.no_grad():
        outputs = features(image(plain))
        expected = plain.features(image(plain))
    assert [out.shape[1] for out in outputs] == [16, 24, 32, 96, 200]
    assert [96 // out.shape[2] for out in outputs] == features.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert torch.equal(outputs[-1], expected)


@pytest.mark.parametrize("case", ["resnet", "mobilenet"])
def test_out_indices(case, request):
    plain, folder = request.getfixturevalue(case)
    features = load(folder, features_only=True, out_indices=(1, 3))
    channels = features.feature_info.channels()
    assert len(channels) == 2
    assert [out.shape[1] for out in features(image(plain))] == channels
    assert features.feature_info.reduction() == [4, 16]


def test_feature_extractor_of_choice(resnet):
    features = load(resnet[1], features_only=True, feature_cls="list")
    assert type(features).__name__ == "FeatureListNet"
    assert [out.shape[1] for out in features(image(resnet[0]))] == [64, 64, 128, 256, 48]


def test_drop_rates_and_pooling(resnet):
    plain, folder = resnet
    model = load(folder, drop_rate=0.3, drop_path_rate=0.2)
    assert model.drop_rate == 0.3
    assert model.layer4[0].drop_path.drop_prob > 0
    assert same(state(plain), state(model))
    model = load(folder, global_pool="max")
    assert not torch.equal(model(image(plain)), plain(image(plain)))
    model = load(folder, num_classes=3, global_pool="catavgmax")
    assert model.fc.weight.shape == (3, 96)


def test_checkpoint_path(resnet):
    plain, folder = resnet
    path = str(folder / "model.safetensors")
    assert same(state(plain), state(timm.create_model(f"local-dir:{folder}", checkpoint_path=path)))


def test_pretrained_cfg_overlay(resnet):
    model = load(resnet[1], pretrained_cfg_overlay={"crop_pct": 0.5})
    assert model.pretrained_cfg["crop_pct"] == 0.5


def test_loading_logs_no_warning(resnet, caplog):
    with caplog.at_level(logging.WARNING):
        load(resnet[1])
    assert caplog.records == []
