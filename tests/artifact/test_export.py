"""Export: what is written is what is loaded, whatever a user changed before; and the card."""

import json

import pytest
import timm
import torch
from helpers.comparisons import same, state
from helpers.exported import CASES, image, load, needs_hub, slim
from helpers.specs import make_recipe
from safetensors.torch import load_file
from timm.models._hub import save_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_autoslim.artifact.export import export
from timm_autoslim.artifact.load import build_slimmed, create_base
from timm_autoslim.errors import ArtifactError


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    model = slim("resnet10t")
    return model, export(model, tmp_path_factory.mktemp("resnet") / "out")


# ---- round trips


@pytest.mark.parametrize("base", CASES)
def test_what_is_loaded_equals_what_was_exported(base, tmp_path):
    plain = slim(base)
    folder = export(plain, tmp_path / "out")
    again = load(folder)
    assert type(again) is type(plain)
    assert again.autoslim == plain.autoslim
    assert same(state(plain), state(again))
    with torch.no_grad():
        assert torch.equal(plain(image(plain)), again(image(plain)))
    pruned = [] if base == "test_vit" or base.startswith("torchvision") else ["pruned.txt"]
    expected = ["README.md", "config.json", "model.safetensors", *pruned, "widths.png"]
    assert sorted(path.name for path in folder.iterdir()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    size = (3, 96, 96) if base == "test_vit" else plain.pretrained_cfg["input_size"]
    expected = {**plain.pretrained_cfg, "num_classes": plain.num_classes, "input_size": size}
    for key in ("first_conv", "classifier", "input_size", "mean", "std", "num_classes"):
        assert again.pretrained_cfg[key] == expected[key], key
    assert again.num_features == plain.num_features
    # a loaded model can be exported again, to the same bytes
    second = export(again, tmp_path / "second")
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
    assert list(config["model_args"]) == ["recipe"]
    assert not {"url", "file", "hf_hub_id", "source", "architecture"} & set(config["pretrained_cfg"])


def test_weights_load_only_when_asked_for(resnet):
    plain, folder = resnet
    fresh = timm.create_model(f"local-dir:{folder}")
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert not torch.equal(fresh.fc.weight, plain.fc.weight)


@needs_hub
def test_hub_folders_load_too(resnet, monkeypatch):
    plain, folder = resnet
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download", lambda *args, **kw: str(folder / (kw.get("filename") or args[1]))
    )
    again = timm.create_model("hf-hub:someone/something", pretrained=True)
    assert same(state(plain), state(again))


@needs_hub
def test_timm_can_save_a_loaded_model_itself(resnet, tmp_path):
    plain, folder = resnet
    again = load(folder)
    save_for_hf(again, str(tmp_path / "saved"), model_args={"recipe": again.autoslim}, safe_serialization=True)
    assert same(state(plain), state(load(tmp_path / "saved")))


# ---- what a user changed after extraction


@pytest.mark.parametrize("classes", [0, 7])
def test_a_new_head_is_recorded(classes, tmp_path):
    plain = slim("resnet10t")
    plain.reset_classifier(classes)
    again = load(export(plain, tmp_path / "out"))
    assert same(state(plain), state(again))
    assert again.num_classes == again.pretrained_cfg["num_classes"] == classes
    assert load(tmp_path / "out", num_classes=5)(image(plain)).shape == (1, 5)


def test_a_head_replaced_by_hand_is_recorded(tmp_path):
    plain = slim("torchvision/mobilenet_v2")
    plain.classifier[1] = nn.Linear(200, 6)
    again = load(export(plain, tmp_path / "out"))
    assert same(state(plain), state(again))
    assert again.num_classes == 6


def test_an_undressed_torchvision_model_exports(tmp_path):
    plain = slim("torchvision/squeezenet1_1")
    for name in ("pretrained_cfg", "default_cfg", "num_classes", "num_features", "feature_info", "head_hidden_size"):
        delattr(plain, name)
    again = load(export(plain, tmp_path / "out"))
    assert same(state(plain), state(again))
    assert (again.num_classes, again.num_features, again.pretrained_cfg["first_conv"]) == (4, 512, "features.0")


@pytest.mark.parametrize("base", ["resnet10t", "torchvision/mobilenet_v2"])
@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels_are_recorded(base, channels, tmp_path):
    plain = slim(base, in_chans=channels)
    again = load(export(plain, tmp_path / "out"))
    assert same(state(plain), state(again))
    assert again.pretrained_cfg["input_size"][0] == channels
    assert again.pretrained_cfg["first_conv"] == plain.pretrained_cfg["first_conv"]
    if base == "resnet10t":
        assert load(tmp_path / "out", in_chans=channels, num_classes=2)(image(again)).shape == (1, 2)


def test_new_pooling_is_recorded(tmp_path):
    plain = slim("resnet10t")
    plain.reset_classifier(3, "catavgmax")
    again = load(export(plain, tmp_path / "out"))
    assert same(state(plain), state(again))
    assert torch.equal(plain(image(plain)), again(image(plain)))


def test_tied_weights_are_written_under_both_names(tmp_path):
    plain = slim("resnet10t")
    plain.bn1.bias = plain.bn1.weight
    folder = export(plain, tmp_path / "out")
    assert same(state(plain), state(load(folder)))


def test_half_precision_weights_are_kept_in_the_file(tmp_path):
    plain = slim("resnet10t").half()
    folder = export(plain, tmp_path / "out")
    assert same(state(plain), load_file(folder / "model.safetensors"))


def test_the_model_stays_as_it_was(tmp_path):
    plain = slim("resnet10t")
    before, recipe, cfg = state(plain), dict(plain.autoslim), dict(plain.pretrained_cfg)
    export(plain, tmp_path / "out", base="resnet10t", base_args={"num_classes": 1000})
    assert same(before, state(plain))
    assert plain.autoslim == recipe
    assert plain.pretrained_cfg == cfg


def test_a_fine_tuned_model_and_its_drop_rates_are_exported(tmp_path):
    narrow, attributes, _ = CASES["resnet10t"]
    rates = {"drop_rate": 0.1, "drop_path_rate": 0.1, "num_classes": 3}
    model = build_slimmed(make_recipe("resnet10t", narrow, attributes, **rates)).train()
    before = state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before["fc.weight"], model.fc.weight)
    again = load(export(model, tmp_path / "out"))
    assert model.training
    assert same(state(model), state(again))
    assert again.drop_rate == 0.1
    assert again.layer4[0].drop_path.drop_prob > 0


# ---- the card


def test_the_card_has_figures_and_the_two_lines(tmp_path):
    card = {"MACs": 300_000_000, "top-1 (%)": 71.25, "budget": "300M | strict"}
    text = (export(slim("resnet10t"), tmp_path / "out", card=card) / "README.md").read_text(encoding="utf-8")
    for line in (
        "| MACs | 300,000,000 |",
        "| top-1 (%) | 71.25 |",
        "| budget | 300M \\| strict |",
        "library_name: timm",
        "import timm, timm_autoslim",
        'model = timm.create_model("local-dir:out", pretrained=True)',
    ):
        assert line in text.splitlines()
    assert "`resnet10t`, slimmed" in text
    assert str(tmp_path) not in text


def test_the_card_s_line_is_code_for_any_name(tmp_path, monkeypatch):
    folder = export(slim("test_vit"), tmp_path / 'a "b"')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec((folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], names)
    assert type(names["model"]).__name__ == "VisionTransformer"


def test_the_card_says_what_the_model_and_its_base_cost(resnet):
    plain, folder = resnet
    text = (folder / "README.md").read_text(encoding="utf-8")
    params = sum(parameter.numel() for parameter in plain.parameters())
    whole = create_base("resnet10t")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(torch.zeros(1, 3, *plain.pretrained_cfg["input_size"][1:]))
    macs = counter.get_total_flops() // 2
    assert "| | MACs | parameters |" in text.splitlines()
    assert f"| this model | {macs:,} | {params:,} |" in text.splitlines()
    assert f"| {sum(parameter.numel() for parameter in whole.parameters()):,} |" in text.replace("`resnet10t`", "")
    assert "![Output channels of every layer, and of the base's](widths.png)" in text
    assert (folder / "widths.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_autoslim.artifact.card.importlib.util.find_spec", lambda name: None)
    folder = export(slim("torchvision/squeezenet1_1"), tmp_path / "out")
    assert not (folder / "widths.png").exists()
    assert "widths.png" not in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("base", ["resnet10t", "mobilenetv2_035"])
def test_timm_alone_loads_the_folder_by_the_lines_of_the_card(base, tmp_path, monkeypatch):
    plain = slim(base)
    text = (export(plain, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    code = text.split("With timm alone, in this folder:")[1].split("```python\n")[1].split("```")[0]
    assert "autoslim" not in code
    monkeypatch.chdir(tmp_path / "out")
    scope = {}
    exec(code, scope)
    again = scope["model"].eval()
    assert type(again) is type(plain)
    assert same(state(plain), state(again))
    assert torch.equal(again(image(plain)), plain(image(plain)))


def test_what_timms_text_cannot_say_is_not_written(tmp_path):
    model = slim("resnet10t")
    model.num_features = 64  # as after a change that the text knows nothing of
    assert not (export(model, tmp_path / "out") / "pruned.txt").exists()
    assert not (export(slim("resnet10t").half(), tmp_path / "half") / "pruned.txt").exists()


@pytest.mark.parametrize("card", [{"MACs": [1]}, {1: 2}])
def test_figures_are_flat(card, tmp_path):
    with pytest.raises(ArtifactError, match="needed a number or text under a text label"):
        export(slim("torchvision/squeezenet1_1"), tmp_path / "out", card=card)
