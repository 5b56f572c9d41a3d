"""A subnet, its extracted model and its reloaded file are one network: convert, extract, calibrate, export, load."""

import pytest
import timm
import torch
from helpers.marks import slow_but

from timm_autoslim import calibrate, convert, export
from timm_autoslim.artifact.bases import create_base

MODELS = {
    "resnet10t": {},
    "resnext26ts": {},
    "mobilenetv3_small_050": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "regnety_002": {},
    "test_vit": {},
    "torchvision/mobilenet_v2": {"width_mult": 0.5},
    "torchvision/MNASNet": {"alpha": 0.5},
    "torchvision/shufflenet_v2_x0_5": {},
    "torchvision/squeezenet1_1": {},
}


@pytest.fixture(scope="module", params=slow_but(["torchvision/squeezenet1_1"], MODELS))
def trip(request, tmp_path_factory):
    """A calibrated half-wide model, its images, and the folder that it was exported to."""
    name = request.param
    torch.manual_seed(0)
    base_args = {"num_classes": 5, **MODELS[name]}
    model = create_base(name, **base_args).eval()
    side = 160 if name == "test_vit" else 64  # a ViT's position embedding fixes the size
    images = torch.randn(8, 3, side, side)
    supernet = convert(model, images[:1], base=name, base_args=base_args)
    widths = supernet.space.uniform(0.5)
    extracted = supernet.extract(widths)
    with torch.no_grad():
        assert torch.equal(supernet(images, widths), extracted(images))
    calibrate(extracted, [images])
    extracted.eval()
    return extracted, images, export(extracted, tmp_path_factory.mktemp("exported") / "out")


@torch.no_grad()
def test_the_reloaded_model_is_the_extracted_one_bit_for_bit(trip):
    extracted, images, folder = trip
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(loaded) is type(extracted)
    assert torch.equal(loaded(images), extracted(images))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in extracted.parameters())


@torch.no_grad()
def test_the_reloaded_model_takes_another_head_and_other_channels(trip):
    extracted, images, folder = trip
    seven = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert seven(images).shape == (8, 7)
    grey = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1).eval()
    assert grey(images[:, :1]).shape == (8, 5)
    assert sum(p.numel() for p in grey.parameters()) < sum(p.numel() for p in extracted.parameters())


@torch.no_grad()
def test_the_features_of_the_reloaded_model_are_as_wide_as_said(trip):
    extracted, images, folder = trip
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    assert [f.shape[1] for f in features(images)] == features.feature_info.channels()
    assert all(info["num_chs"] > 0 for info in extracted.feature_info)


def test_a_reloaded_model_converts_and_slims_once_more(trip, tmp_path):
    _, images, folder = trip
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    supernet = convert(loaded, images[:1])
    narrow = supernet.extract(supernet.space.uniform(0.5))
    calibrate(narrow, [images])
    narrow.eval()
    export(narrow, tmp_path / "second")
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(images), narrow(images))
