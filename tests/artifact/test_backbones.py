"""Backbones of timm (`features_only=True`) convert like any model, and tell the channels that they return."""

import pytest
import timm
import torch
from helpers.marks import slow_but
from helpers.widths import arbitrary_widths
from torch import nn

import timm_autoslim
from timm_autoslim.errors import ArtifactError

IMAGES = torch.rand(2, 3, 64, 64)
KINDS = {
    "a list": ("test_resnet", {}),
    "a list, of modules within modules": ("test_convnext", {"out_indices": (0, 2)}),
    "a dict": ("test_resnet", {"feature_cfg": {"feature_cls": "dict"}, "out_indices": (-3, -1)}),
    "hooks": ("test_resnet", {"feature_cfg": {"feature_cls": "hook"}}),
    "a class of its own": ("mobilenetv3_small_050", {}),
    "forward_intermediates": ("test_vit", {"img_size": 64, "out_indices": (0, 1)}),
    "channels last": ("test_mambaout", {}),
}


def maps(model, images):
    with torch.no_grad():
        outputs = model(images)
    return list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


@pytest.mark.parametrize("kind", slow_but(["a list", "hooks", "channels last"], KINDS))
def test_a_backbone_tells_the_channels_that_it_returns(kind):
    name, args = KINDS[kind]
    backbone = timm.create_model(name, features_only=True, **args).eval()
    full = backbone.feature_info.channels()
    supernet = timm_autoslim.convert(backbone, IMAGES, keep_output=False)
    for seed in range(3):
        widths = arbitrary_widths(supernet.space, torch.Generator().manual_seed(seed))
        extracted = supernet.extract(widths)
        outputs = maps(extracted, IMAGES)
        assert extracted.feature_info.channels() == [out.shape[3 if kind == "channels last" else 1] for out in outputs]
        with torch.no_grad():
            subnet_maps = supernet(IMAGES, widths)
        subnet_maps = list(subnet_maps.values()) if isinstance(subnet_maps, dict) else subnet_maps
        assert all(torch.equal(a, b) for a, b in zip(outputs, subnet_maps, strict=True))
    assert extracted.feature_info.channels() != full
    assert backbone.feature_info.channels() == full  # conversion and forward leave the model as it is


def test_a_backbone_is_not_exported_by_itself(tmp_path):
    backbone = timm.create_model("test_resnet", features_only=True)
    supernet = timm_autoslim.convert(backbone, IMAGES, keep_output=False, base="test_resnet")
    with pytest.raises(ArtifactError, match=r"FeatureListNet: got a backbone .*load it with features_only=True"):
        timm_autoslim.export(supernet.extract(supernet.space.uniform(0.5)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Detector(nn.Module):
    """A neck and a head on a backbone of timm, as a user would write them."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("test_convnext", features_only=True, out_indices=(1, 2))
        self.neck = nn.ModuleList(nn.Conv2d(n, 16, 1) for n in self.backbone.feature_info.channels())
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return [self.head(level(y)) for level, y in zip(self.neck, self.backbone(x), strict=True)]


@pytest.mark.slow
def test_a_detector_on_a_backbone_shrinks_with_it():
    detector = Detector().eval()
    supernet = timm_autoslim.convert(detector, IMAGES)
    extracted = supernet.extract(supernet.space.uniform(0.5))
    channels = extracted.backbone.feature_info.channels()
    assert channels == [level.in_channels for level in extracted.neck]
    assert channels == [n // 2 for n in detector.backbone.feature_info.channels()]
    assert [out.shape[1] for out in maps(extracted, IMAGES)] == [5, 5]


@pytest.mark.slow
def test_a_backbone_inside_a_model_of_timm_keeps_its_channels_in_a_file(tmp_path):
    args = {"img_size": 64, "num_classes": 10, "depth": 1}
    base = timm.create_model("vit_small_resnet26d_224", **args).eval()
    supernet = timm_autoslim.convert(base, IMAGES, base_args=args)
    extracted = supernet.extract(supernet.space.uniform(0.5))
    timm_autoslim.calibrate(extracted, [torch.cat([IMAGES, IMAGES.flip(3)])])
    timm_autoslim.export(extracted, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    backbone = loaded.patch_embed.backbone
    assert backbone.feature_info.channels() == [maps(backbone, IMAGES)[0].shape[1]] == [1024]
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), extracted.eval()(IMAGES))
