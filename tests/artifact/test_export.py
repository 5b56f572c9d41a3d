"""Export: what is written is what is loaded, whatever a user changed before."""

import json

import pytest
import timm
import torch
from helpers.comparisons import same, state
from helpers.exported import CASES, image, load, needs_hub, slim
from helpers.marks import slow_but
from helpers.specs import make_spec
from safetensors.torch import load_file
from timm.models._hub import save_for_hf
from torch import nn

from timm_autoslim.artifact.build import build_slim
from timm_autoslim.artifact.export import export


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    model = slim("resnet10t")
    return model, export(model, tmp_path_factory.mktemp("resnet") / "out")


# ---- round trips


@pytest.mark.parametrize("base", slow_but(["resnet10t", "torchvision/squeezenet1_1"], CASES))
def test_what_is_loaded_equals_what_was_exported(base, tmp_path):
    model = slim(base)
    folder = export(model, tmp_path / "out")
    loaded = load(folder)
    assert type(loaded) is type(model)
    assert loaded.autoslim == model.autoslim
    assert same(state(model), state(loaded))
    with torch.no_grad():
        assert torch.equal(model(image(model)), loaded(image(model)))
    pruned = [] if base == "test_vit" or base.startswith("torchvision") else ["pruned.txt"]
    expected = ["README.md", "config.json", "model.safetensors", *pruned, "widths.png"]
    assert sorted(path.name for path in folder.iterdir()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    size = (3, 96, 96) if base == "test_vit" else model.pretrained_cfg["input_size"]
    expected = {**model.pretrained_cfg, "num_classes": model.num_classes, "input_size": size}
    for key in ("first_conv", "classifier", "input_size", "mean", "std", "num_classes"):
        assert loaded.pretrained_cfg[key] == expected[key], key
    assert loaded.num_features == model.num_features
    # a loaded model can be exported again, to the same bytes
    second = export(loaded, tmp_path / "second")
    assert same(load_file(folder / "model.safetensors"), load_file(second / "model.safetensors"))
    assert (folder / "config.json").read_bytes() == (second / "config.json").read_bytes()


def test_config_is_what_timm_reads(resnet):
    _, folder = resnet
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert list(config) == [
        "architecture",
        "num_classes",
        "num_features",
        "global_pool",
        "model_args",
        "pretrained_cfg",
    ]
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("autoslim", 1000, 48)
    assert list(config["model_args"]) == ["spec"]
    assert not {"url", "file", "hf_hub_id", "source", "architecture"} & set(config["pretrained_cfg"])


def test_weights_load_only_when_asked_for(resnet):
    model, folder = resnet
    fresh = timm.create_model(f"local-dir:{folder}")
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert not torch.equal(fresh.fc.weight, model.fc.weight)


@needs_hub
def test_hub_folders_load_too(resnet, monkeypatch):
    model, folder = resnet
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download", lambda *args, **kw: str(folder / (kw.get("filename") or args[1]))
    )
    loaded = timm.create_model("hf-hub:someone/something", pretrained=True)
    assert same(state(model), state(loaded))


@needs_hub
def test_timm_can_save_a_loaded_model_itself(resnet, tmp_path):
    model, folder = resnet
    loaded = load(folder)
    save_for_hf(
        loaded, str(tmp_path / "saved"), model_args={"spec": loaded.autoslim.to_dict()}, safe_serialization=True
    )
    assert same(state(model), state(load(tmp_path / "saved")))


# ---- what a user changed after extraction


@pytest.mark.slow
@pytest.mark.parametrize("classes", slow_but([7], [0, 7]))
def test_a_new_head_is_recorded(classes, tmp_path):
    model = slim("resnet10t")
    model.reset_classifier(classes)
    loaded = load(export(model, tmp_path / "out"))
    assert same(state(model), state(loaded))
    assert loaded.num_classes == loaded.pretrained_cfg["num_classes"] == classes
    assert load(tmp_path / "out", num_classes=5)(image(model)).shape == (1, 5)


@pytest.mark.slow
def test_a_head_replaced_by_hand_is_recorded(tmp_path):
    model = slim("torchvision/mobilenet_v2")
    model.classifier[1] = nn.Linear(200, 6)
    loaded = load(export(model, tmp_path / "out"))
    assert same(state(model), state(loaded))
    assert loaded.num_classes == 6


def test_a_torchvision_model_that_timm_knows_nothing_of_exports(tmp_path):
    model = slim("torchvision/squeezenet1_1")
    for name in ("pretrained_cfg", "default_cfg", "num_classes", "num_features", "feature_info", "head_hidden_size"):
        delattr(model, name)
    loaded = load(export(model, tmp_path / "out"))
    assert same(state(model), state(loaded))
    assert (loaded.num_classes, loaded.num_features, loaded.pretrained_cfg["first_conv"]) == (4, 512, "features.0")


@pytest.mark.parametrize("base", slow_but(["resnet10t"], ["resnet10t", "torchvision/mobilenet_v2"]))
@pytest.mark.parametrize("channels", slow_but([4], [1, 4]))
def test_other_input_channels_are_recorded(base, channels, tmp_path):
    model = slim(base, in_chans=channels)
    loaded = load(export(model, tmp_path / "out"))
    assert same(state(model), state(loaded))
    assert loaded.pretrained_cfg["input_size"][0] == channels
    assert loaded.pretrained_cfg["first_conv"] == model.pretrained_cfg["first_conv"]
    if base == "resnet10t":
        assert load(tmp_path / "out", in_chans=channels, num_classes=2)(image(loaded)).shape == (1, 2)


def test_new_pooling_is_recorded(tmp_path):
    model = slim("resnet10t")
    model.reset_classifier(3, "catavgmax")
    loaded = load(export(model, tmp_path / "out"))
    assert same(state(model), state(loaded))
    assert torch.equal(model(image(model)), loaded(image(model)))


def test_tied_weights_are_written_under_both_names(tmp_path):
    model = slim("resnet10t")
    model.bn1.bias = model.bn1.weight
    folder = export(model, tmp_path / "out")
    assert same(state(model), state(load(folder)))


def test_half_precision_weights_are_kept_in_the_file(tmp_path):
    model = slim("resnet10t").half()
    folder = export(model, tmp_path / "out")
    assert same(state(model), load_file(folder / "model.safetensors"))


def test_the_model_stays_as_it_was(tmp_path):
    model = slim("resnet10t")
    before, spec, cfg = state(model), model.autoslim, dict(model.pretrained_cfg)
    export(model, tmp_path / "out", base="resnet10t", base_args={"num_classes": 1000})
    assert same(before, state(model))
    assert model.autoslim is spec
    assert model.pretrained_cfg == cfg


def test_a_fine_tuned_model_and_its_drop_rates_are_exported(tmp_path):
    narrow, attributes, _ = CASES["resnet10t"]
    rates = {"drop_rate": 0.1, "drop_path_rate": 0.1, "num_classes": 3}
    model = build_slim(make_spec("resnet10t", narrow, attributes, **rates)).train()
    before = state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before["fc.weight"], model.fc.weight)
    loaded = load(export(model, tmp_path / "out"))
    assert model.training
    assert same(state(model), state(loaded))
    assert loaded.drop_rate == 0.1
    assert loaded.layer4[0].drop_path.drop_prob > 0
