"""What export refuses, and that it leaves nothing behind."""

import os

import pytest
import torch
from helpers.comparisons import same, state
from helpers.exported import CASES, load, slim
from helpers.specs import changed, make_recipe
from torch import nn

from timm_autoslim.artifact import export as artifact
from timm_autoslim.artifact.export import export
from timm_autoslim.artifact.load import apply_recipe, build_slimmed, create_base
from timm_autoslim.errors import ArtifactError, OutputExistsError, StaleStatisticsError


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
    message = r"layer2\.0\.bn2: got BatchNorm statistics that are the whole model's.*timm_autoslim\.calibrate"
    refused(StaleStatisticsError, message, tmp_path, model)


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


@pytest.mark.parametrize("step", ["save_file", "write_card", "sync_to_disk"])
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


def test_a_process_that_was_quicker_keeps_its_folder(tmp_path, monkeypatch):
    plain = slim("test_vit")
    rename = os.rename

    def late(draft, folder):
        folder.mkdir()
        (folder / "theirs").touch()
        rename(draft, folder)

    monkeypatch.setattr("os.rename", late)
    with pytest.raises(OutputExistsError, match="exists already"):
        export(plain, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]
