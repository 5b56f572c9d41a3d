import argparse
import csv
import io
import json
import tarfile

import data
import finetune
import pytest
import run
import search
import timm
import torch
import yaml
from helpers.recipes import RECIPES, common, launch, parse, train, write_config
from PIL import Image

from timm_autoslim.costs.cost import cost
from timm_autoslim.errors import AutoSlimError, BudgetError, ConfigError, DataError, OutputExistsError
from timm_autoslim.slimming.budgets import read_budgets, uniform_within

CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


# ------------------------------------------------------------------------------------------------- configuration


def test_one_file_serves_every_recipe(tmp_path):
    config = write_config(tmp_path, epochs=7, finetune_epochs=3, **{"clip-grad": 2, "search_batch_size": 99})
    assert parse("train", config).clip_grad == 2.0
    assert parse("train", config).epochs == 7
    assert parse("finetune", config, "somewhere").epochs == 3
    assert [parse("search", config, "r").batch_size, parse("finetune", config, "r").batch_size] == [99, 32]
    assert parse("train", config, "--epochs", "2", "--no-amp").epochs == 2
    assert parse("search", config, "r", "--budgets", "macs=10%", "params=1M").budgets == ["macs=10%", "params=1M"]


@pytest.mark.parametrize(
    ("key", "nearest"), [("epoch", "epochs"), ("finetune_budgets", "budgets"), ("batchsize", "batch_size")]
)
def test_unknown_key_is_an_error_that_names_the_nearest(tmp_path, key, nearest):
    config = write_config(tmp_path, **{key: 1})
    for recipe in common.FLAGS:
        with pytest.raises(ConfigError, match=f"Unknown key '{key}' in .*: no recipe has it. .* is '.*{nearest}'"):
            parse(recipe, config, *(() if recipe == "train" else ("r",)))


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("epochs", "many", "int"), ("epochs", 1.5, "int"), ("epochs", True, "int"), ("lr", [1], "float"),
        ("amp", "yes please", "true or false"), ("model_kwargs", [1], "a mapping"), ("scale", [1.0], "a list of float"),
        ("rank", "loss", "one of 'error', 'per_cost'"), ("model", {"a": 1}, "text"),
    ],
)  # fmt: skip
def test_value_of_the_wrong_type_is_an_error(tmp_path, key, value, needed):
    with pytest.raises(ConfigError, match=f"{key}: .* does not fit: it needs {needed}"):
        parse("train", write_config(tmp_path, **{key: value}))


def test_unreadable_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read"):
        parse("train", str(tmp_path / "nowhere.yaml"))
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"must be `key: value` lines, but holds a list"):
        parse("train", str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_its_budgets_are_in_reach(path):
    args = common.parse_args("train", None, ["-c", str(path)])
    for recipe in ("search", "finetune"):
        common.parse_args(recipe, None, ["somewhere", "-c", str(path)])
    args.num_classes = args.num_classes or 10
    with torch.device("meta"):
        supernet = common.make_supernet(args)
    texts = search.budget_texts(common.parse_args("search", None, ["somewhere", "-c", str(path)]).budgets)
    for budget in read_budgets(supernet, texts):
        assert 0.8 < budget.used(cost(supernet, uniform_within(supernet, budget))) <= 1 < budget.used(cost(supernet))
    assert "/" not in yaml.safe_load(path.read_text()).get("data_dir", "")


def test_flags_of_run_are_configuration_values():
    flags = ["--train-epochs", "3", "--budgets", "macs=40%", "params=1M", "--amp", "--scale", "0.5", "1", "--lr=1e-1"]
    assert run.overrides(flags) == {
        "train_epochs": 3, "budgets": ["macs=40%", "params=1M"], "amp": True, "scale": [0.5, 1], "lr": "1e-1"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="'stray' is no flag"):
        run.overrides(["stray"])


# ---------------------------------------------------------------------------------------------------------- data


def make_images(folder, classes, count=4):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(folder / name / f"{index}.png")


def data_args(**changes):
    args = {"dataset": None, "data_dir": None, "in_chans": 3, "num_classes": None, "workers": 0, "seed": 0}
    return argparse.Namespace(**args | changes)


def test_digits_are_split_once_and_for_all():
    images = data.open_images(data_args(in_chans=1))
    assert (len(images.train), len(images.test), images.num_classes) == (1437, 360, 10)
    assert not set(images.train.indices) & set(images.test.indices)
    assert images.train[0][0].mode == "L"
    counts = [sum(images.test[i][1] == digit for i in range(360)) for digit in range(10)]
    assert min(counts) >= 34
    assert max(counts) <= 37


def test_folder_and_tar_are_read(tmp_path):
    make_images(tmp_path / "train", ["cat", "dog", "emu"])
    make_images(tmp_path / "plain", ["dog", "emu"], count=2)
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        tar.add(tmp_path / "plain", arcname="")
    images = data.open_images(data_args(data_dir=str(tmp_path)))
    assert (len(images.train), len(images.test), images.num_classes) == (12, 4, 3)
    # numbered by the training classes, though the test images lack the first
    assert {images.test[i][1] for i in range(4)} == {1, 2}


def test_missing_or_empty_data_name_the_folder(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        data.open_images(data_args(data_dir=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"holds nothing, but needs train/ or train.tar"):
        data.open_images(data_args(data_dir=str(tmp_path)))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"holds train, but needs val/ or val.tar"):
        data.open_images(data_args(data_dir=str(tmp_path)))
    with tarfile.open(tmp_path / "val.tar", "w"):
        pass
    with pytest.raises(DataError, match="train holds no images that timm can read"):
        data.open_images(data_args(data_dir=str(tmp_path)))
    make_images(tmp_path / "train", ["cat", "dog"])
    with pytest.raises(DataError, match=r"val.tar holds no images that timm can read"):
        data.open_images(data_args(data_dir=str(tmp_path)))


def test_classes_that_contradict_are_refused(tmp_path):
    make_images(tmp_path / "train", ["cat", "dog"])
    make_images(tmp_path / "val", ["cat", "yak"])
    with pytest.raises(DataError, match=r"classes that .* does not have: yak"):
        data.open_images(data_args(data_dir=str(tmp_path)))
    with pytest.raises(DataError, match="--num-classes 1000 contradicts the data, which have 10 classes"):
        data.open_images(data_args(num_classes=1000))
    with pytest.raises(DataError, match="--dataset digits has its own images"):
        data.open_images(data_args(dataset="digits", data_dir=str(tmp_path)))
    with pytest.raises(DataError, match="--dataset torch/cifar10 cannot be read"):
        data.open_images(data_args(dataset="torch/cifar10", data_dir=str(tmp_path)))


def test_held_out_images_are_disjoint_and_stay(tmp_path):
    args = argparse.Namespace(limit_train=0.5, held_out=0.2)
    training, held_out = data.split_training(args, 1000, tmp_path)
    assert (len(training), len(held_out)) == (400, 100)
    assert not set(training) & set(held_out)
    assert held_out != sorted(held_out)
    args.held_out = 0.5
    assert data.split_training(args, 1000, tmp_path) == (training, held_out)
    assert sorted(data.used_training(tmp_path, 1000)) == sorted(training + held_out)
    with pytest.raises(DataError, match="drawn from 1000 training images, but there are 999 now"):
        data.split_training(args, 999, tmp_path)


@pytest.mark.parametrize(
    ("limit", "held", "text"),
    [(2000, 0.1, "--limit-train 2000 asks for 2000 of 1000"), (0.5, 500, "leaves none of 500"), (1.0, -1, "held-out")],
)
def test_impossible_splits_are_refused(tmp_path, limit, held, text):
    with pytest.raises(DataError, match=text):
        data.split_training(argparse.Namespace(limit_train=limit, held_out=held), 1000, tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- roads


def test_the_whole_road_with_one_command(tmp_path, monkeypatch, capsys):
    command = ["-c", write_config(tmp_path), "--output", str(tmp_path), "--experiment", "road", "--finetune-lr", "0.01"]
    done = launch(str(RECIPES / "run.py"), *command)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "road"
    names = ["macs-60pct-searched", "macs-60pct-uniform"]
    assert [entry["name"] for entry in json.loads((folder / "search.json").read_text())["networks"]] == names
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == names
    assert yaml.safe_load((folder / "args.yaml").read_text())["num_classes"] == 10
    assert yaml.safe_load((folder / "finetune" / names[0] / "args.yaml").read_text())["lr"] == 0.01
    for table in ("summary.csv", "search.csv", f"finetune/{names[0]}/summary.csv"):
        assert len(list(csv.reader(io.StringIO((folder / table).read_text())))) > 1
    assert (folder / "table.md").read_text() in done.stdout
    for name in names:
        model = timm.create_model(f"local-dir:{folder / 'exported' / name}", pretrained=True)
        assert sum(parameter.numel() for parameter in model.parameters()) == results[name]["params"]
        assert model.pretrained_cfg["input_size"] == (1, 16, 16)
        assert f"loaded again: {name} {results[name]['top1']:.2f} %" in done.stdout
        card = (folder / "exported" / name / "README.md").read_text()
        expected = {"budget": "macs <= 60%", "found by": results[name]["kind"], "MACs": f"{results[name]['macs']:,}"}
        expected |= {"params": f"{results[name]['params']:,}", "test top-1, %": round(results[name]["top1"], 2)}
        assert all(f"| {label} | {value} |" in card for label, value in expected.items())

    monkeypatch.setattr(run, "launch", lambda *_: pytest.fail("a finished stage ran again"))
    run.main(command)
    assert "| macs 60% | searched |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"was begun with other settings \(seed\)"):
        run.main([*command, "--seed", "5"])
    with pytest.raises(OutputExistsError, match=r"exists: this network is done"):
        finetune.main([str(folder), "--network", names[0]])
    with pytest.raises(OutputExistsError, match=r"holds a training \(supernet.safetensors\): --resume it"):
        train.main(command[:-2])
    with pytest.raises(ConfigError, match=r"Did you mean macs-60pct-uniform\?"):
        finetune.main([str(folder), "--network", "uniform"])
    with pytest.raises(DataError, match=r"--images 33: .* lists 32 only"):
        search.main([str(folder), "--images", "33"])
    with pytest.raises(BudgetError, match="out of reach"):
        search.main([str(folder), "--budgets", "macs=0.1%"])


@pytest.mark.parametrize("budgets", ["macs=60%", "latency_ms=60%"])
def test_every_stage_runs_in_the_processes_asked_for(tmp_path, monkeypatch, budgets):
    launched = []
    monkeypatch.setattr(run, "launch", lambda count, recipe, *_: launched.append((recipe, count)))
    with pytest.raises(FileNotFoundError, match=r"search\.json"):
        run.main(
            ["-c", write_config(tmp_path), "--output", str(tmp_path), "--num-processes", "3", "--budgets", budgets]
        )
    assert launched == [("train.py", 3), ("search.py", 3)]


def test_errors_reach_the_shell_as_messages(tmp_path):
    with pytest.raises(SystemExit, match="ConfigError: it was so"):
        common.command(lambda: (_ for _ in ()).throw(ConfigError("it was so")))
    assert issubclass(ConfigError, AutoSlimError)
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds no args.yaml. Train first"):
        search.main([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"holds no search.json: search first"):
        finetune.main([str(tmp_path)])
    args = parse("train", write_config(tmp_path))
    common.write_args(tmp_path, args)
    with pytest.raises(ConfigError, match=r"holds no supernet.safetensors: finish its training first"):
        search.main([str(tmp_path)])
