"""Flags that users of timm are used to."""

import pytest
import torch
from helpers.recipes import parse_train
from PIL import Image

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes import run
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.lib.loaders import make_training_loader
from timm_autoslim.recipes.lib.models import checkpoint_gradients, create_model
from timm_autoslim.recipes.lib.settings import write_settings


def test_data_is_positional_as_in_timm():
    assert parse_args("train", None, ["DATA"]).data_dir == "DATA"
    assert parse_args("train", None, ["DATA", "--data-dir", "DATA"]).data_dir == "DATA"
    assert parse_args("slim", None, ["--epochs", "3", "DATA"]).data_dir == "DATA"
    with pytest.raises(ConfigError, match="OTHER and --data-dir DATA are two folders"):
        parse_args("train", None, ["--data-dir", "DATA", "OTHER"])


def test_data_is_positional_for_all_stages(tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(run, "run_stages", lambda folder, config, processes: configs.append(config))
    run.main(["DATA", "-c", "digits", "--output", str(tmp_path)])
    assert configs[0]["data_dir"] == "DATA"


def test_a_flag_of_all_stages_replaces_what_the_file_has_for_one(tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(run, "run_stages", lambda folder, config, processes: configs.append(config))
    assert {"train_epochs", "finetune_epochs"} <= run.read_config("digits").keys()
    run.main(["--epochs", "1", "--finetune-epochs", "3", "--output", str(tmp_path)])
    assert {key: value for key, value in configs[0].items() if "epochs" in key and "warmup" not in key} == {
        "epochs": 1, "finetune_epochs": 3
    }  # fmt: skip


def test_what_is_left_out_of_all_stages_is_as_before_unless_a_file_is_named(tmp_path, monkeypatch, capsys):
    configs, folder = [], tmp_path / "digits"
    monkeypatch.setattr(run, "run_stages", lambda folder, config, processes: configs.append(config))
    before = run.read_config("digits") | {"budgets": ["macs=40%"], "lr": 0.3}
    for begun in (False, True):
        folder.mkdir(exist_ok=True)
        write_settings(folder / "config.yaml", before)
        if begun:
            (folder / "checkpoints").mkdir()
        run.main(["--seed", "3", "--output", str(tmp_path)])
        assert configs[-1]["seed"] == 3
        assert (configs[-1].get("lr") == 0.3) is (configs[-1]["budgets"] == ["macs=40%"]) is begun
        assert ("as before: --budgets macs=40% --lr 0.3." in capsys.readouterr().out) is begun
    run.main(["-c", "digits", "--output", str(tmp_path)])
    assert configs[-1]["budgets"] == run.read_config("digits")["budgets"]
    assert configs[-1]["lr"] == 0.3


def test_dropout_size_and_teacher_have_timm_s_names():
    flags = ["--drop", "0.1", "--drop-path", "0.2", "--input-size", "1", "64", "64", "--kd-model-name", "resnet50"]
    args = parse_args("train", None, [*flags, "--model", "resnet18"])
    assert args.model_kwargs == {"drop_rate": 0.1, "drop_path_rate": 0.2}
    assert (args.in_chans, args.img_size, args.teacher) == (1, 64, "resnet50")
    assert not {"drop", "drop_path", "input_size", "data"} & set(vars(args))
    with pytest.raises(ConfigError, match="--in-chans 1 contradicts --input-size 3 64 64"):
        parse_args("train", None, ["--input-size", "3", "64", "64", "--in-chans", "1"])
    with pytest.raises(ConfigError, match="square images"):
        parse_args("train", None, ["--input-size", "3", "64", "96"])
    with pytest.raises(ConfigError, match=r"--drop 1\.5: needed a number from 0"):
        parse_args("train", None, ["--drop", "1.5"])


def test_training_images_may_be_resized_otherwise(tmp_path):
    args = parse_train(tmp_path, "--train-interpolation", "bilinear", "--interpolation", "nearest")
    loader = make_training_loader(args, [(Image.new("L", (20, 20)), 0)] * 40, range(40))
    resize = loader.dataset.transform.transforms[0]
    assert str(resize.interpolation).endswith("BILINEAR")
    with pytest.raises(ConfigError, match="--train-interpolation bilinaer is unknown"):
        parse_args("train", None, ["--train-interpolation", "bilinaer"])


def test_gradient_checkpointing_is_switched_on_where_there_is_any(tmp_path):
    args = parse_train(tmp_path, "--grad-checkpointing")
    model = create_model(args)
    checkpoint_gradients(model, args)
    assert model.grad_checkpointing
    with pytest.raises(ConfigError, match="--grad-checkpointing: resnet10t has no such thing"):
        checkpoint_gradients(torch.nn.Linear(1, 1), args)
