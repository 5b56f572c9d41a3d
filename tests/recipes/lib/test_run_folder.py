"""The files of a run folder."""

import argparse

import pytest
import torch
import torchvision

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.run_folder import load_weights, read_args, read_weights, write_args, write_weights


def test_flags_of_a_recipe_win_over_those_of_the_training(tmp_path):
    write_args(tmp_path, argparse.Namespace(model="resnet10t", batch_size=32, data_dir="images", mean=[0.5]))
    args = read_args(tmp_path, argparse.Namespace(run=str(tmp_path), batch_size=8, data_dir=None))
    assert vars(args) == {
        "model": "resnet10t", "batch_size": 8, "data_dir": "images", "mean": [0.5], "run": str(tmp_path),
        "crop_mode": "center",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds no args.yaml. Train first"):
        read_args(tmp_path / "nowhere", argparse.Namespace())


def test_run_folders_of_earlier_versions_cropped_the_centre(tmp_path):
    for crop, expected in (({}, "center"), ({"crop_mode": "squash"}, "squash")):
        write_args(tmp_path, argparse.Namespace(model="resnet10t", data_dir="images", **crop))
        assert read_args(tmp_path, argparse.Namespace(data_dir=None)).crop_mode == expected


@pytest.mark.parametrize("text", ["", "- 1", "data_dir: images"])
def test_a_file_without_the_flags_of_a_training_is_refused(tmp_path, text):
    (tmp_path / "args.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"args\.yaml: got no such flags; needed: .*train again in another folder"):
        read_args(tmp_path, argparse.Namespace(data_dir=None))


def test_weights_are_read_as_they_were_written(tmp_path):
    first, second = (torch.nn.BatchNorm1d(3) for _ in range(2))
    torch.nn.init.normal_(first.weight)
    write_weights(tmp_path / "weights.safetensors", first)
    read_weights(tmp_path / "weights.safetensors", second)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        read_weights(tmp_path / "weights.safetensors", torch.nn.Linear(3, 3))


def test_weights_without_versions_are_loaded_by_models_that_need_them():
    first, second = (torchvision.models.mnasnet0_5(num_classes=3) for _ in range(2))
    with pytest.raises(ValueError, match="version should be set to 1 or 2"):
        second.load_state_dict(dict(first.state_dict()))
    load_weights(second, dict(first.state_dict()))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_one_name_of_tied_weights_is_enough(tmp_path):
    def make():
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    first, second = make(), make()
    write_weights(tmp_path / "weights.safetensors", first)
    read_weights(tmp_path / "weights.safetensors", second)
    assert second[1].weight is second[0].weight
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"1.bias\""):
        load_weights(second, {name: value for name, value in first.state_dict().items() if name != "1.bias"})
