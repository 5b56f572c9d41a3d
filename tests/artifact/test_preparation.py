"""How images are prepared is said once, and is true of the model: its size, what goes with a size, and its channels."""

import re

import pytest
import timm
import torch
from helpers.exported import load
from helpers.marks import slow_but
from timm.data import resolve_data_config
from torch import nn

from timm_autoslim import convert, cost, create_base, export
from timm_autoslim.artifact.preparation import find_image_size, measure_pool_size, merge_settings, write_input_size

BASE = {"input_size": (3, 176, 176), "test_input_size": (3, 224, 224), "test_crop_pct": 0.95, "crop_pct": 0.9,
        "pool_size": (6, 6), "min_input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (0.3, 0.3, 0.3),
        "fixed_input_size": True}  # fmt: skip


def sizes(model):
    """The sizes of images that timm's validate.py takes, with --use-train-size and without."""
    return [resolve_data_config({}, model=model, use_test_size=on)["input_size"] for on in (False, True)]


def extract(name, example, **args):
    supernet = convert(create_base(name, **args), example, base=name, base_args=args)
    return supernet, supernet.extract()


@pytest.mark.parametrize("name", slow_but(["resnet10t"], ["resnet10t", "torchvision/squeezenet1_1"]))
def test_a_folder_says_the_size_that_the_supernet_was_traced_with(name, tmp_path):
    supernet, model = extract(name, torch.zeros(1, 3, 64, 64))
    before = dict(getattr(supernet.model, "pretrained_cfg", {}))
    folder = export(model.eval(), tmp_path / "out", card={"top-1": 5})
    loaded = load(folder)
    assert sizes(model) == sizes(loaded) == [(3, 64, 64)] * 2
    assert resolve_data_config({}, model=loaded, use_test_size=True)["crop_pct"] == before["crop_pct"]
    assert loaded.pretrained_cfg.get("pool_size") == ((2, 2) if name == "resnet10t" else None)
    card = (folder / "README.md").read_text()
    assert f"| this model | {cost(supernet).macs:,} | {cost(supernet).params:,} |" in card
    assert "Input: 3 x 64 x 64." in card
    assert re.search(
        r"For a test, images are prepared by timm: \w+ resizing, center crop of [\d.]+ %, mean 0.485", card
    )
    assert before["input_size"] == dict(supernet.model.pretrained_cfg)["input_size"] != (3, 64, 64)


@pytest.mark.slow
def test_at_the_size_of_the_base_its_test_size_stays(tmp_path):
    _, model = extract("resnet10t", None)
    folder = export(model.eval(), tmp_path / "out")
    loaded = load(folder)
    assert sizes(model) == sizes(loaded) == [(3, 176, 176), (3, 224, 224)]
    assert loaded.pretrained_cfg["pool_size"] == (6, 6)
    assert loaded.pretrained_cfg["test_crop_pct"] == 0.95
    assert (
        "images are prepared by timm: 224 x 224 pixels, bicubic resizing, center crop of 95 %"
        in (folder / "README.md").read_text()
    )


@pytest.mark.slow
def test_what_the_user_says_last_counts(tmp_path):
    _, model = extract("resnet10t", None)
    model.pretrained_cfg["input_size"] = (3, 96, 96)
    model.pretrained_cfg["mean"] = (0.5, 0.5, 0.5)
    loaded = load(export(model.eval(), tmp_path / "out"))
    assert sizes(loaded) == [(3, 96, 96)] * 2  # not the base's size of a test
    assert loaded.pretrained_cfg["pool_size"] == (3, 3)
    assert loaded.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_other_channels_have_a_mean_each(tmp_path):
    _, model = extract("resnet10t", torch.zeros(1, 1, 64, 64), in_chans=1)
    data = resolve_data_config({}, model=load(export(model.eval(), tmp_path / "out")), use_test_size=True)
    assert data["input_size"] == (1, 64, 64)
    assert data["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert len(data["std"]) == 1


@pytest.mark.slow
def test_a_transformer_of_any_size_is_loaded_as_it_was_built(tmp_path):
    _, model = extract("test_vit", torch.zeros(1, 3, 64, 64), dynamic_img_size=True)
    folder = export(model.eval(), tmp_path / "out")
    loaded = load(folder)
    assert sizes(loaded) == [(3, 64, 64)] * 2
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    larger = load(folder, img_size=96)
    assert sizes(larger) == [(3, 96, 96)] * 2
    assert larger.pos_embed.shape[1] < model.pos_embed.shape[1] == loaded.pos_embed.shape[1]
    again = load(export(larger, tmp_path / "again", base_args={"dynamic_img_size": True, "img_size": 96}))
    assert sizes(again) == [(3, 96, 96)] * 2
    assert again.pos_embed.shape == larger.pos_embed.shape


# ---- the parts


def test_settings_agree_with_the_size_in_them():
    assert merge_settings({}, BASE, 3) == BASE
    assert merge_settings({"mean": (1, 1, 1)}, BASE, 3) == BASE | {"mean": (1, 1, 1)}
    assert merge_settings(BASE, BASE, 3) == BASE
    other = merge_settings(BASE | {"input_size": (3, 32, 32)}, BASE, 3)
    assert other == {"input_size": (3, 32, 32), "crop_pct": 0.9, "mean": BASE["mean"], "std": BASE["std"],
                     "fixed_input_size": False}  # fmt: skip
    own = {"input_size": (3, 192, 192), "test_input_size": (3, 256, 256)}
    assert merge_settings(own, BASE, 3)["test_input_size"] == (3, 256, 256)
    assert not {"test_crop_pct", "pool_size"} & set(merge_settings(own, BASE, 3))
    gray = merge_settings(BASE, BASE, 1)
    assert [gray[key] for key in ("input_size", "test_input_size", "min_input_size")] == [
        (1, 176, 176), (1, 224, 224), (1, 64, 64)
    ]  # fmt: skip
    assert (gray["mean"], gray["std"]) == (pytest.approx((0.2,)), pytest.approx((0.3,)))


def test_a_model_s_settings_are_its_own():
    first = timm.create_model("resnet10t", num_classes=10)
    second = timm.create_model("resnet10t", num_classes=10)
    second.pretrained_cfg = second.default_cfg = shared = first.pretrained_cfg
    write_input_size(second, (3, 176, 176))
    assert second.pretrained_cfg is shared
    write_input_size(second, (1, 176, 176))
    assert second.pretrained_cfg == second.default_cfg == {**shared, "input_size": (1, 176, 176)}
    assert first.pretrained_cfg["input_size"] == (3, 176, 176)
    model = nn.Linear(3, 3)
    write_input_size(model, (3, 8, 8))
    assert model.pretrained_cfg == {"input_size": (3, 8, 8)}


def test_the_size_of_images_is_that_of_a_single_input_of_four_axes():
    image = torch.zeros(2, 3, 8, 9)
    assert find_image_size(image) == find_image_size((image,)) == (3, 8, 9)
    for example in (image[0], image.long(), (image, image), {"x": image}, [], None, 3):
        assert find_image_size(example) is None


def test_the_map_that_is_pooled_is_measured():
    model = timm.create_model("resnet10t", num_classes=10).train()
    assert measure_pool_size(model, (3, 64, 96)) == (2, 3)
    assert model.training
    with torch.device("meta"):
        swin, vgg, vit = (timm.create_model(name) for name in ("swin_tiny_patch4_window7_224", "vgg11", "test_vit"))
    assert measure_pool_size(swin, (3, 224, 224)) == (7, 7)  # channels come last
    assert measure_pool_size(vgg, (3, 64, 64)) == (2, 2)
    assert measure_pool_size(vit, (3, 160, 160)) is None
    assert measure_pool_size(vit, (3, 64, 64)) is None  # which it does not take
    assert measure_pool_size(nn.Linear(3, 3), (3, 8, 8)) is None
