"""timm's arguments on a model that is loaded from an exported folder."""

import json
import logging
import shutil

import pytest
import timm
import torch
from helpers.comparisons import same, state
from helpers.exported import image, load, slim
from helpers.members import build
from helpers.models import mark_calibrated
from packaging.version import Version
from safetensors.torch import save_file
from torch import nn

import timm_autoslim
from timm_autoslim.artifact.bases import find_filter
from timm_autoslim.artifact.export import export
from timm_autoslim.artifact.limits import bounded_unfilled
from timm_autoslim.errors import ArtifactError


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
    plain, folder = resnet
    for kind, given in (("Getter", {"feature_cls": "getter"}), ("Graph", {"feature_cfg": {"feature_cls": "fx"}})):
        features = load(folder, features_only=True, **given)
        assert type(features).__name__ == f"Feature{kind}Net"
        assert [out.shape[1] for out in features(image(plain))] == [64, 64, 128, 256, 48]
    two = load(folder, features_only=True, feature_cfg={"out_indices": (0, 2)})
    assert two.feature_info.channels() == [64, 128]


def test_the_backbone_is_of_the_kind_that_the_base_makes(resnet, tmp_path):
    features = load(resnet[1], features_only=True)
    base = timm.create_model("resnet10t", features_only=True)
    assert type(features) is type(base)
    assert features.state_dict().keys() == base.state_dict().keys()
    supernet = timm_autoslim.convert(timm.create_model("test_efficientnet"), torch.zeros(1, 3, 64, 64))
    plain = mark_calibrated(supernet.extract(supernet.space.uniform(0.5)))
    features = load(export(plain, tmp_path / "out"), features_only=True)  # its base has a class of its own
    features.set_grad_checkpointing()
    assert features.model.grad_checkpointing


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


# ---- another image size


def at_sizes(name, folder, widths):
    """A model exported at its own size, and how its base and its folder load at a size of choice."""
    model, args, side = build(name)
    supernet = timm_autoslim.convert(model, torch.zeros(1, 3, side, side), base=name, base_args=args)
    plain = supernet.extract(supernet.space.uniform(widths)).eval()
    for module in plain.modules():
        if getattr(module, "num_batches_tracked", None) is not None:
            module.num_batches_tracked.fill_(7)  # as `build` does
    export(plain, folder / "out")
    weights = folder / "base.safetensors"
    save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, weights)
    file = {"file": str(weights), "num_classes": 10, "input_size": (3, side, side), "custom_load": False}

    def base(**given):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, **{**args, **given}).eval()

    return plain, base, lambda **given: load(folder / "out", **given), side


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_another_image_size_is_loaded_as_timm_loads_the_base(name, tmp_path):
    plain, base, again, side = at_sizes(name, tmp_path, 1.0)
    for size in (2 * side, (side, 2 * side), [side // 2, 2 * side], side // 2):
        theirs, ours = state(base(img_size=size)), state(again(img_size=size))
        assert same(theirs, ours)
        if size != [side // 2, 2 * side] or Version(timm.__version__) >= Version("1.0.31"):
            assert not same(theirs, state(plain))  # before, timm left embeddings alone whose number fits
    assert same(state(plain), state(again(img_size=side)))
    assert same(state(plain), state(again(img_size=[side, side])))


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_a_narrow_model_takes_another_image_size(name, tmp_path):
    plain, base, again, side = at_sizes(name, tmp_path, 0.5)
    wide, own = state(base(img_size=2 * side)), state(plain)
    model = again(img_size=2 * side, num_classes=7, in_chans=1)
    assert model(torch.randn(2, 1, 2 * side, 2 * side)).shape == (2, 7)
    for key, value in state(again(img_size=2 * side)).items():
        if value.shape == own[key].shape:
            assert torch.equal(value, own[key])
        else:  # resized, channel by channel: the first channels of what the base has
            expected = wide[key][tuple(map(slice, value.shape))]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    assert same(own, state(again(img_size=side)))


def test_a_size_that_the_base_cannot_take_is_refused(tmp_path):
    _, _, again, side = at_sizes("cait_xxs24_224", tmp_path, 0.5)
    assert find_filter("torchvision/resnet18") is None
    with pytest.raises(ArtifactError, match=r"(?s)img_size.*size mismatch for pos_embed"):
        again(img_size=2 * side, num_classes=7)


def test_weights_of_another_size_are_refused_whatever_is_asked(tmp_path):
    plain, _, again, side = at_sizes("test_vit", tmp_path, 0.5)
    tensors = {key: value.clone() for key, value in plain.state_dict().items()}
    tensors["pos_embed"] = torch.cat([tensors["pos_embed"]] * 2, 1)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ArtifactError, match="'pos_embed': shape"):
        again(img_size=2 * side)


def test_the_filter_is_the_one_that_timm_passes_on():
    assert find_filter("resnet18") is None
    for name, given in (("vit_base_patch16_siglip_224", {}), ("flexivit_small", {"interpolation": "bilinear"})):
        found = find_filter(name)
        assert getattr(found, "keywords", {}).items() >= given.items()
        assert getattr(found, "func", found).__name__ == "checkpoint_filter_fn"
    assert find_filter("crossvit_tiny_240").__name__ == "pretrained_filter_fn"
    assert timm.create_model("test_vit").pos_embed.shape[1] == 101  # timm itself builds on


# ---- random numbers that the file replaces at once


@pytest.fixture
def empty_is_nan():
    """Memory that nobody filled holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("base", ["resnet10t", "mobilenetv2_035", "test_vit", "torchvision/mobilenet_v2"])
def test_none_are_drawn_for_a_model_as_it_was_exported(base, empty_is_nan, tmp_path):
    plain = slim(base)
    folder = export(plain, tmp_path / "out")
    before = torch.get_rng_state()
    model = load(folder)
    # timm 1.0.16 makes embeddings by `randn`, which leaves nothing unfilled
    assert base == "test_vit" or torch.equal(torch.get_rng_state(), before)
    assert same(state(plain), state(model))
    with torch.no_grad():
        assert torch.equal(plain(image(plain)), model(image(plain)))
    for given in ({"num_classes": 7}, {"num_classes": 0}, {"in_chans": 1}, {"pretrained_cfg_overlay": {"crop_pct": 1}}):
        other = load(folder, **given)
        assert not any(tensor.isnan().any() for tensor in state(other).values())
        assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not timm.list_models("naflexvit_base_patch16_gap"), reason="this timm has no NaFlexVit")
def test_a_slimmed_naflex_model_takes_patches_of_images_of_any_size(tmp_path):
    given = {"num_classes": 7, "depth": 2, "embed_dim": 64, "num_heads": 4}
    base = timm.create_model("naflexvit_base_patch16_gap", **given).eval()
    supernet = timm_autoslim.convert(base, torch.zeros(1, 3, 64, 64), base_args=given)
    widths = supernet.space.uniform(0.5)
    plain = supernet.extract(widths)
    again = load(export(plain, tmp_path / "out"))
    places = torch.cartesian_prod(torch.arange(4), torch.arange(5))  # of 20 patches; the second image has 15
    batch = {
        "patches": torch.randn(2, 20, 3 * 16 * 16),
        "patch_coord": places.expand(2, -1, -1),
        "patch_valid": torch.arange(20) < torch.tensor([[20], [15]]),
    }
    with torch.no_grad():
        found = plain(batch)
        assert found.shape == (2, 7)
        assert torch.equal(supernet(batch, widths=widths), found)
        assert torch.equal(again(batch), found)
        changed = {**batch, "patches": batch["patches"].clone()}
        changed["patches"][1, 15:] += 1  # patches that are no part of the image
        assert torch.equal(again(changed), found)
        images = torch.randn(2, 3, 48, 80)
        assert torch.equal(again(images), plain(images))


class Drawn(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        nn.init.trunc_normal_(self.weight)
        other = nn.Parameter(torch.empty(4))
        nn.init.normal_(other)
        if kept == "hidden":
            self.other = [other]  # no state dict has it
        elif kept == "used":
            torch.linalg.eigh(self.weight)  # refuses NaN


@pytest.mark.parametrize(("kept", "filled"), [("", False), ("hidden", True), ("used", True)])
def test_what_needs_its_random_numbers_has_them(kept, filled, empty_is_nan):
    model = bounded_unfilled("resnet10t", 1, Drawn, kept)
    assert model.weight.isnan().any() == (not filled)
    assert not filled or not any(tensor.isnan().any() for tensor in [model.weight, *getattr(model, "other", ())])
    assert (model.weight.abs() <= 2).all() == filled


def test_a_stranger_cannot_leave_weights_unfilled(resnet, tmp_path):
    shutil.copytree(resnet[1], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["model_args"]["unfilled"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for pretrained in (False, True):
        with pytest.raises(ArtifactError, match="'unfilled'"):
            timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=pretrained)
