"""One way to name a model, for all commands."""

import json

import pytest
import timm
import torch
from helpers.specs import make_spec

from timm_autoslim import export
from timm_autoslim.__main__ import main
from timm_autoslim.artifact.build import build_slim
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.lib.models import create_model, make_supernet
from timm_autoslim.recipes.lib.names import create_named, resolve_name


@pytest.fixture
def folder(tmp_path):
    """An exported folder."""
    narrow = {"blocks.0.mlp.fc1": (100, None), "blocks.0.mlp.fc2": (None, 100)}
    return export(build_slim(make_spec("test_vit", narrow, num_classes=2)).eval(), tmp_path / "slim")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ressnet50", "resnet50"), ("torchvision/resnt18", "torchvision/resnet18"), ("alexnet", "torchvision/alexnet"),
        ("convnext_tiny.in12k_ft_in1", "convnext_tiny.in12k_ft_in1k"),
        ("mobilnetv3_small_100", "mobilenetv3_small_100"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_told_with_the_nearest(name, near, capsys):
    with pytest.raises(ConfigError, match=f"did you mean {near} or|did you mean {near}\\?"):
        resolve_name(name)
    assert main(["inspect", name]) == 1
    assert f"did you mean {near}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"did you mean {near}"):
        parse_args("train", None, ["--model", name])


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet18.a1_in1k", "torchvision/resnet18", "torchvision/MNASNet", "hf-hub:a/b"]
)
def test_names_that_are_known_stay(name):
    assert resolve_name(name) == name


def test_the_folder_of_a_run_is_no_model_and_one_of_its_networks_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert resolve_name("resnet18") == "resnet18"  # a known name wins
    with pytest.raises(ConfigError, match=r"holds no config\.json; needed: a folder that timm can load"):
        resolve_name(str(tmp_path))
    network = tmp_path / "exported" / "macs-50pct-searched"
    network.mkdir(parents=True)
    (network / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"needed: that of a network, such as {network}"):
        resolve_name(str(tmp_path))


def test_a_name_like_nothing_is_refused_without_a_guess():
    with pytest.raises(ConfigError, match=r"'qqqqqq', which is unknown; needed: a name of timm[^;]*$"):
        resolve_name("qqqqqq")
    with pytest.raises(ConfigError, match="which is unknown"):
        resolve_name("autoslim")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        resolve_name("local-dir:nowhere")


@pytest.mark.slow
def test_a_folder_is_a_model_in_every_command(folder, capsys):
    assert resolve_name(str(folder)) == resolve_name(f"local-dir:{folder}") == f"local-dir:{folder}"
    assert main(["inspect", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"] == f"local-dir:{folder}"
    args = parse_args("train", None, ["--model", str(folder)])
    args.num_classes = 2
    assert args.in_chans == 3
    model = create_model(args, pretrained=True)
    stored = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(tensor, stored.state_dict()[name]) for name, tensor in model.state_dict().items())
    supernet = make_supernet(args, model)
    assert supernet.model.autoslim.base == "test_vit"


def test_img_size_reaches_models_that_are_built_for_one(capsys):
    flags = ["vit_tiny_patch16_224", "--img-size", "64", "--model-kwargs", "depth=1"]
    args = parse_args("train", None, ["--model", *flags])
    args.num_classes = 2
    assert create_model(args).patch_embed.img_size == (64, 64)
    assert main(["inspect", *flags, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model_kwargs"] == {"img_size": 64, "depth": 1}
    assert shown["widest"]["macs"] < 20e6


def test_what_cannot_be_loaded_is_said():
    with pytest.raises(ConfigError, match="local-dir:nowhere cannot be loaded with"):
        create_named("local-dir:nowhere")
