"""Export, and loading what was exported through timm."""

import json
import logging
import os

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_registry import RESNET, RESNET_ATTRIBUTES, changed, make_recipe, same, state
from timm.models._hub import has_hf_hub, save_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_autoslim.artifact as artifact
from timm_autoslim.artifact import export
from timm_autoslim.errors import ArtifactError, OutputExistsError, StaleStatisticsError
from timm_autoslim.registry import apply_recipe, build_slimmed, create_base

MOBILENET = {"features.18.0": (200, None), "features.18.1": (200, None), "classifier.1": (None, 200)}
TIMM_MOBILENET = {"blocks.1.0.conv_pw": (24, None), "blocks.1.0.bn1": (24, None), "blocks.1.0.conv_dw": (24, None),
                  "blocks.1.0.bn2": (24, None), "blocks.1.0.conv_pwl": (None, 24)}  # fmt: skip
SQUEEZENET = {"features.3.squeeze": (9, None), "features.3.expand1x1": (None, 9), "features.3.expand3x3": (None, 9)}
CASES = {
    "resnet10t": (RESNET, RESNET_ATTRIBUTES, {}),
    "mobilenetv2_035": (TIMM_MOBILENET, {"blocks.1.0.conv_dw.groups": 24}, {"num_classes": 11}),
    "test_vit": ({"blocks.0.mlp.fc1": (100, None), "blocks.0.mlp.fc2": (None, 100)}, {}, {"img_size": 96}),
    "torchvision/mobilenet_v2": (MOBILENET, {}, {}),
    "torchvision/squeezenet1_1": (SQUEEZENET, {}, {"num_classes": 4}),
    "torchvision/MNASNet": ({}, {}, {"alpha": 0.35}),
}


needs_hub = pytest.mark.skipif(not has_hf_hub(), reason="this timm does not work with this huggingface_hub")


def slim(base, **settings):
    """A slimmed model with its own BatchNorm statistics, as after calibration."""
    narrow, attributes, base_args = CASES[base]
    model = build_slimmed(make_recipe(base, narrow, attributes, **base_args), **settings)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked += 3
            module.running_mean.normal_(0, 0.1, generator=generator)
    return model.eval()


def load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def image(model, batch=1):
    channels, size = model.pretrained_cfg["input_size"][0], 96
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    model = slim("resnet10t")
    return model, export(model, tmp_path_factory.mktemp("resnet") / "out")


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    model = slim("torchvision/mobilenet_v2")
    return model, export(model, tmp_path_factory.mktemp("mobilenet") / "out")


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


# ---- timm's arguments on a loaded model


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
    monkeypatch.setattr("timm_autoslim.card.importlib.util.find_spec", lambda name: None)
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


# ---- refusals


def refused(error, message, tmp_path, model, **kwargs):
    with pytest.raises(error, match=message):
        export(model, tmp_path / "deep" / "out", **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_recipe_is_refused(tmp_path):
    refused(
        ArtifactError, r"ResNet has no recipe: .*use supernet.extract\(widths\)", tmp_path, create_base("resnet10t")
    )


def test_a_recipe_without_a_base_is_refused_until_it_is_given(tmp_path):
    model = slim("mobilenetv2_035")
    model.autoslim.update(base=None, base_args={})
    refused(ArtifactError, "recipe without a base: needed .*; pass base=", tmp_path, model)
    folder = export(model, tmp_path / "out", base="mobilenetv2_035")
    assert load(folder).autoslim == {**model.autoslim, "base": "mobilenetv2_035"}


def test_stale_statistics_are_refused(tmp_path):
    model = slim("resnet10t")
    model.layer2[0].bn2.num_batches_tracked.zero_()
    message = r"layer2\.0\.bn2: got BatchNorm statistics over 0 batches.*timm_autoslim\.calibrate"
    refused(StaleStatisticsError, message, tmp_path, model)


def test_a_fine_tuned_model_and_its_drop_rates_are_exported(tmp_path):
    narrow, attributes, _ = CASES["resnet10t"]
    rates = {"drop_rate": 0.1, "drop_path_rate": 0.1, "num_classes": 3}
    model = build_slimmed(make_recipe("resnet10t", narrow, attributes, **rates)).train()
    before = state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before["layer4.0.conv2.weight"], model.layer4[0].conv2.weight)
    again = load(export(model, tmp_path / "out"))
    assert model.training
    assert same(state(model), state(again))
    assert again.drop_rate == 0.1
    assert again.layer4[0].drop_path.drop_prob > 0


def test_the_widest_model_keeps_the_statistics_of_the_base(tmp_path):
    model = apply_recipe(create_base("resnet10t"), make_recipe("resnet10t", {}))
    assert same(state(model), state(load(export(model, tmp_path / "out"))))


def test_a_base_with_other_arguments_is_refused(tmp_path):
    narrow, attributes, _ = CASES["torchvision/squeezenet1_1"]
    recipe = make_recipe("torchvision/squeezenet1_1", narrow, attributes)
    model = build_slimmed({**recipe, "base": "torchvision/squeezenet1_1"})
    model.features[0] = nn.Conv2d(3, 32, 3, stride=2)
    message = (
        r"features\.0\.weight: got shape \(32, 3, 3, 3\), needed shape \(64, 3, 3, 3\) as the base and the recipe "
        r"build it; pass base_args= with the arguments that 'torchvision/squeezenet1_1' was created with"
    )
    refused(ArtifactError, message, tmp_path, model)


def test_another_base_is_refused(tmp_path):
    model = slim("torchvision/squeezenet1_1")
    refused(ArtifactError, "needed an integer from|sizes|needed", tmp_path, model, base="torchvision/squeezenet1_0")
    model.autoslim.update(sizes={}, attributes={})
    refused(
        ArtifactError,
        "model: got SqueezeNet, needed AlexNet; pass base_args=",
        tmp_path,
        model,
        base="torchvision/alexnet",
    )


def test_missing_and_foreign_tensors_are_named(tmp_path):
    model = slim("torchvision/squeezenet1_1")
    model.register_buffer("extra", torch.zeros(2))
    refused(ArtifactError, r"extra: got shape \(2,\), needed no such tensor", tmp_path, model)
    del model.extra
    model.features[0].bias = None
    refused(ArtifactError, r"features\.0\.bias: got no such tensor, needed shape \(64,\)", tmp_path, model)


def test_base_args_that_json_changes_are_refused(tmp_path):
    model = slim("test_vit")
    refused(
        ArtifactError,
        r"recipe 'base_args': got .*JSON does not return",
        tmp_path,
        model,
        base_args={"img_size": (96, 96)},
    )


def test_base_args_that_load_weights_are_refused(tmp_path):
    refused(ArtifactError, "recipe 'base_args.pretrained'", tmp_path, slim("resnet10t"), base_args={"pretrained": True})


def test_a_malformed_recipe_is_refused(tmp_path):
    model = slim("resnet10t")
    model.autoslim = changed(model.autoslim, ["sizes", "conv1.0.weight"], [900, None, None, None])
    refused(ArtifactError, r"recipe 'sizes\.conv1\.0\.weight': got \[900", tmp_path, model)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_output_is_refused_and_untouched(kind, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="exists already, nothing was written"):
        export(slim("torchvision/squeezenet1_1"), out)
    assert os.listdir(tmp_path) == ["out"]
    if kind == "folder":
        assert [path.name for path in out.iterdir()] == ["mine.txt"]
        assert (out / "mine.txt").read_text() == "mine"
    elif kind == "file":
        assert out.read_text() == "mine"
    else:
        assert out.is_symlink()


@pytest.mark.parametrize("step", ["save_file", "write_card", "_sync"])
@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt("stop")])
def test_a_failed_write_leaves_nothing(step, fault, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise fault

    model = slim("torchvision/squeezenet1_1")
    monkeypatch.setattr(artifact, step, fail)
    with pytest.raises(type(fault), match=str(fault)):
        export(model, tmp_path / "new" / "parent" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    def race(*args, **kwargs):
        (tmp_path / "out").mkdir()
        return "card"

    model = slim("torchvision/squeezenet1_1")
    monkeypatch.setattr(artifact, "write_card", race)
    with pytest.raises(OutputExistsError):
        export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


def test_bases_that_cannot_stand_on_the_meta_device_export(tmp_path):
    model = apply_recipe(create_base("torchvision/regnet_y_400mf"), make_recipe("torchvision/regnet_y_400mf", {}))
    with pytest.raises(ArtifactError, match="meta"), torch.device("meta"):
        create_base("torchvision/regnet_y_400mf")
    assert same(state(model), state(load(export(model, tmp_path / "out"))))
