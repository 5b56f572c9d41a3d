"""timm's entrypoint for slim models, and timm's arguments on a model that is loaded from an exported folder."""

import json
import logging
import shutil

import pytest
import timm
import torch
from helpers.comparisons import same, state
from helpers.exported import image, load, slim
from helpers.marks import slow_but
from helpers.specs import RESNET, RESNET_ATTRIBUTES, make_spec
from timm.models import PretrainedCfg

import timm_autoslim
from timm_autoslim.artifact.export import export
from timm_autoslim.artifact.load import Changes, Source, find_changes
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ArtifactError


@pytest.fixture(scope="module")
def spec():
    return make_spec("resnet10t", RESNET, RESNET_ATTRIBUTES)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    model = slim("resnet10t")
    return model, export(model, tmp_path_factory.mktemp("resnet") / "out")


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    model = slim("torchvision/mobilenet_v2")
    return model, export(model, tmp_path_factory.mktemp("mobilenet") / "out")


# ---- the entrypoint


def test_the_entrypoint_is_registered_and_says_what_it_is():
    assert timm.is_model("autoslim")
    with pytest.raises(ArtifactError, match=r"timm.create_model\('local-dir:FOLDER', pretrained=True\)"):
        timm.create_model("autoslim")
    with pytest.raises(ArtifactError, match="the format of before the first release"):
        timm.create_model("autoslim", recipe={})
    with pytest.raises(TypeError):  # as from the base, for programs that try
        timm.create_model("autoslim", spec=make_spec("resnet10t", {}), nonsense=1)


def test_the_entrypoint_builds_a_spec_without_a_folder(spec):
    model = timm.create_model("autoslim", spec=spec.to_dict(), num_classes=7)
    assert type(model) is type(timm.create_model("resnet10t"))
    assert model.fc.weight.shape == (7, 48)
    assert model.autoslim == spec
    assert model.pretrained_cfg["first_conv"] == "conv1.0"
    assert "url" not in model.pretrained_cfg
    assert "hf_hub_id" not in model.pretrained_cfg
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("autoslim", spec=spec, pretrained=True)


def test_fixed_image_sizes_of_the_spec_win_over_the_data_settings():
    spec = make_spec("test_vit", {}, img_size=96)
    model = timm.create_model("autoslim", spec=spec)
    assert model.pos_embed.shape[1] == (96 // 16) ** 2 + 1
    model = timm.create_model("autoslim", spec=spec, img_size=64)
    assert model.pos_embed.shape[1] == (64 // 16) ** 2 + 1


# ---- what is asked for, beside what was exported


SOURCE = Source(
    "folder",
    Spec(base="test_vit", base_args={"img_size": [96, 64]}),
    PretrainedCfg(num_classes=7, input_size=(3, 96, 64)),
    global_pool="avg",
)
NONE = {"classes": False, "head": False, "size": False, "pooling": False}


@pytest.mark.parametrize(
    ("kwargs", "num_classes", "fixed_head", "expected"),
    [
        ({}, 7, False, {}),
        ({"drop_rate": 0.1, "in_chans": 1}, 7, False, {}),
        ({}, 5, False, {"classes": True}),
        ({}, None, False, {"classes": True}),
        ({}, 0, False, {"classes": True, "head": True}),
        ({"features_only": True}, 7, False, {"classes": True}),
        ({"img_size": (96, 64)}, 7, False, {}),
        ({"img_size": [96, 64]}, 7, False, {}),
        ({"img_size": 96}, 7, False, {"size": True}),
        ({"global_pool": "max"}, 7, False, {}),  # reset_classifier changes it
        ({"global_pool": "avg"}, 7, True, {}),
        ({"global_pool": "max"}, 7, True, {"pooling": True}),
        ({}, 7, True, {"pooling": True}),
    ],
)
def test_the_parts_that_differ_from_the_exported_model(kwargs, num_classes, fixed_head, expected):
    assert find_changes(SOURCE, kwargs, num_classes, fixed_head) == Changes(**{**NONE, **expected})


def test_a_model_without_a_head_that_had_none_is_the_exported_one():
    source = Source("folder", Spec(base="resnet10t"), PretrainedCfg(num_classes=0))
    assert find_changes(source, {}, 0, False) == Changes(**NONE)
    assert find_changes(source, {"img_size": 176}, 0, False) == Changes(**NONE)
    assert find_changes(source, {"img_size": 225}, 0, False).size


# ---- arguments of timm.create_model


@pytest.mark.parametrize("case", slow_but(["resnet"], ["resnet", "mobilenet"]))
def test_num_classes(case, request):
    exported, folder = request.getfixturevalue(case)
    seven, none = load(folder, num_classes=7), load(folder, num_classes=0)
    names = set(exported.state_dict())
    head = exported.pretrained_cfg["classifier"]
    others = {name for name in names if not name.startswith(f"{head}.")}
    for model in (seven, none):
        assert all(torch.equal(exported.state_dict()[name], model.state_dict()[name]) for name in others)
    assert (seven.num_classes, none.num_classes) == (7, 0)
    assert seven(image(exported)).shape == (1, 7)
    assert none(image(exported)).shape == (1, exported.num_features)
    assert set(none.state_dict()) == others


@pytest.mark.parametrize("case", slow_but(["resnet"], ["resnet", "mobilenet"]))
def test_in_chans(case, request):
    exported, folder = request.getfixturevalue(case)
    grey = load(folder, in_chans=1)
    stem = f"{exported.pretrained_cfg['first_conv']}.weight"
    expected = exported.state_dict()[stem].sum(1, keepdim=True)
    torch.testing.assert_close(grey.state_dict()[stem], expected, rtol=0, atol=1e-6)
    assert grey(torch.randn(1, 1, 64, 64)).shape == (1, 1000)


def test_drop_rates_and_pooling(resnet):
    exported, folder = resnet
    model = load(folder, drop_rate=0.3, drop_path_rate=0.2)
    assert model.drop_rate == 0.3
    assert model.layer4[0].drop_path.drop_prob > 0
    assert same(state(exported), state(model))
    model = load(folder, global_pool="max")
    assert not torch.equal(model(image(exported)), exported(image(exported)))
    model = load(folder, num_classes=3, global_pool="catavgmax")
    assert model.fc.weight.shape == (3, 96)


def test_checkpoint_path(resnet):
    exported, folder = resnet
    path = str(folder / "model.safetensors")
    assert same(state(exported), state(timm.create_model(f"local-dir:{folder}", checkpoint_path=path)))


def test_pretrained_cfg_overlay(resnet):
    model = load(resnet[1], pretrained_cfg_overlay={"crop_pct": 0.5})
    assert model.pretrained_cfg["crop_pct"] == 0.5


def test_loading_logs_no_warning(resnet, caplog):
    with caplog.at_level(logging.WARNING):
        load(resnet[1])
    assert caplog.records == []


@pytest.mark.slow
@pytest.mark.skipif(not timm.list_models("naflexvit_base_patch16_gap"), reason="this timm has no NaFlexVit")
def test_a_slim_naflex_model_takes_patches_of_images_of_any_size(tmp_path):
    args = {"num_classes": 7, "depth": 2, "embed_dim": 64, "num_heads": 4}
    base = timm.create_model("naflexvit_base_patch16_gap", **args).eval()
    supernet = timm_autoslim.convert(base, torch.zeros(1, 3, 64, 64), base_args=args)
    widths = supernet.space.uniform(0.5)
    exported = supernet.extract(widths)
    loaded = load(export(exported, tmp_path / "out"))
    places = torch.cartesian_prod(torch.arange(4), torch.arange(5))  # of 20 patches; the second image has 15
    batch = {
        "patches": torch.randn(2, 20, 3 * 16 * 16),
        "patch_coord": places.expand(2, -1, -1),
        "patch_valid": torch.arange(20) < torch.tensor([[20], [15]]),
    }
    with torch.no_grad():
        logits = exported(batch)
        assert logits.shape == (2, 7)
        assert torch.equal(supernet(batch, widths=widths), logits)
        assert torch.equal(loaded(batch), logits)
        changed = {**batch, "patches": batch["patches"].clone()}
        changed["patches"][1, 15:] += 1  # patches that are no part of the image
        assert torch.equal(loaded(changed), logits)
        images = torch.randn(2, 3, 48, 80)
        assert torch.equal(loaded(images), exported(images))


def test_a_stranger_cannot_leave_weights_unfilled(resnet, tmp_path):
    shutil.copytree(resnet[1], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["model_args"]["unfilled"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for pretrained in (False, True):
        with pytest.raises(ArtifactError, match="'unfilled'"):
            timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=pretrained)
