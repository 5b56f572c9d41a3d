"""Models of timm and torchvision inside other models: each can be exported by itself."""

import pytest
import timm
import torch
import torchvision
from helpers.models import randomise
from torch import nn

from timm_autoslim import calibrate, convert, export, load, save
from timm_autoslim.artifact.parts import list_parts
from timm_autoslim.errors import ArtifactError

IMAGES = torch.randn(4, 3, 32, 32)
SMALL = {"channels": (16, 24, 32, 40), "stem_width": 8}


def body(**arguments):
    return timm.create_model("resnet10t", **{**SMALL, "num_classes": 5, **arguments})


class TwoHeads(nn.Module):
    def __init__(self, classes=0, features=False):
        super().__init__()
        self.body, self.features = body(num_classes=classes), features
        self.first, self.second = nn.Linear(40, 3), nn.Linear(40, 2)

    def forward(self, x):
        body = self.body
        h = body.forward_head(body.forward_features(x), pre_logits=True) if self.features else body(x)
        return self.first(h), self.second(h)


def narrow(model, share=0.5):
    torch.manual_seed(0)
    supernet = convert(randomise(model), IMAGES[:1])
    slim = supernet.extract(supernet.space.uniform(share))
    calibrate(slim, [IMAGES])
    return slim.eval()


def reload(part, folder, **arguments):
    export(part, folder, **arguments)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def build_sequence():
    return nn.Sequential(nn.BatchNorm2d(3, affine=False), body())


def build_dict():
    return nn.ModuleDict({"net": nn.ModuleDict({"model": TwoHeads()})})["net"]["model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "path"),
    [(build_sequence, "1"), (TwoHeads, "body"), (build_dict, "body"), (lambda: nn.Sequential(TwoHeads()), "0.body")],
)
def test_a_timm_model_in_another_model_is_exported(build, path, tmp_path):
    slim = narrow(build())
    part = slim.get_submodule(path)
    loaded = reload(part, tmp_path / "part")
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), part(IMAGES))
    assert loaded.pretrained_cfg["input_size"] == (3, 32, 32)
    assert loaded.autoslim.base == "resnet10t"
    assert loaded.autoslim.widths["layer4.0.conv1"] == part.layer4[0].conv1.out_channels


@pytest.mark.slow
def test_a_part_of_a_loaded_model_is_exported(tmp_path):
    slim = narrow(TwoHeads())
    again = load(save(slim, tmp_path / "slim"), TwoHeads()).eval()
    with torch.no_grad():
        assert torch.equal(reload(again.body, tmp_path / "part")(IMAGES), slim.body(IMAGES))


@pytest.mark.slow
def test_a_part_that_was_slim_before_is_exported(tmp_path):
    first = reload(narrow(body()), tmp_path / "first")
    second = narrow(nn.Sequential(first))
    with torch.no_grad():
        assert torch.equal(reload(second[0], tmp_path / "second")(IMAGES), second[0](IMAGES))
    assert second[0].conv1[0].out_channels < first.conv1[0].out_channels


@pytest.mark.slow
def test_a_torchvision_model_in_another_model_needs_its_name(tmp_path):
    model = nn.Sequential(torchvision.models.squeezenet1_1(num_classes=3))
    slim = narrow(model)
    with pytest.raises(ArtifactError, match=r"export\(model\.get_submodule\('0'\), folder, base=\.\.\.\)"):
        export(slim, tmp_path / "slim")
    name = {"base": "torchvision/squeezenet1_1", "base_args": {"num_classes": 3}}
    with torch.no_grad():
        assert torch.equal(reload(slim[0], tmp_path / "part", **name)(IMAGES), slim(IMAGES))


def test_a_model_without_a_base_says_what_works(tmp_path):
    slim = narrow(TwoHeads())
    with pytest.raises(ArtifactError, match=r"export\(model\.body, folder\) exports a part; timm_autoslim\.save"):
        export(slim, tmp_path / "slim")
    with pytest.raises(ArtifactError, match=r"timm_autoslim\.save\(model, folder\)"):
        export(narrow(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))), tmp_path / "slim")


@pytest.mark.slow
def test_a_part_whose_own_head_never_ran_is_exported_without_it(tmp_path):
    slim = narrow(TwoHeads(classes=10, features=True))
    with pytest.raises(ArtifactError, match=r"a forward that raises.*reset_classifier\(0\)"):
        export(slim.body, tmp_path / "part")
    assert not (tmp_path / "part").exists()
    slim.body.reset_classifier(0)
    loaded = reload(slim.body, tmp_path / "part")
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), slim.body(IMAGES))


def test_a_backbone_is_saved_with_the_model_around_it(tmp_path):
    def build():
        return nn.Sequential(body(features_only=True, out_indices=(2, 3)))

    slim = narrow(build())
    assert [path for path, _ in list_parts(slim)] == ["0"]
    loaded = load(save(slim, tmp_path / "slim"), build()).eval()
    with torch.no_grad():
        assert all(map(torch.equal, loaded(IMAGES), slim(IMAGES)))
    assert loaded[0].feature_info.channels() == slim[0].feature_info.channels()
    with pytest.raises(ArtifactError, match=r"timm_autoslim\.save"):
        export(slim[0], tmp_path / "part")
