import argparse
import copy
import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch.nn import functional as F

import timm_autoslim
from timm_autoslim.errors import AutoSlimError, BudgetError, ConfigError, DataError, OutputExistsError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
sys.path.insert(0, str(RECIPES))

import common  # noqa: E402
import data  # noqa: E402
import finetune  # noqa: E402
import loop  # noqa: E402
import run  # noqa: E402
import search  # noqa: E402
import train  # noqa: E402

CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
TINY = {
    "model": "resnet10t", "model_kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8}, "in_chans": 1, "img_size": 16,
    "mean": [0.5], "std": [0.5], "limit_train": 160, "held_out": 32, "batch_size": 32, "calibration_images": 64,
    "threads": 1, "color_jitter": 0.0, "warmup_epochs": 0, "lr": 0.05, "epochs": 1, "search_steps": 2,
    "budgets": ["macs=60%"],
}  # fmt: skip


def write_config(folder, **changes):
    path = Path(folder) / "config.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return str(path)


def parse(recipe, config, *argv):
    return common.parse_args(recipe, None, [*argv, "-c", config])


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
    budgets = search.read_budgets(common.parse_args("search", None, ["somewhere", "-c", str(path)]).budgets)
    for unit, amounts in budgets.items():
        for amount in amounts:
            widths = timm_autoslim.uniform_at(supernet, unit, amount)
            cost = getattr(timm_autoslim.cost(supernet, widths), unit)
            limit = timm_autoslim.costs.parse_budget(amount, getattr(timm_autoslim.cost(supernet), unit))
            assert 0.8 * limit < cost <= limit < getattr(timm_autoslim.cost(supernet), unit)
    assert "/" not in yaml.safe_load(path.read_text()).get("data_dir", "")


def test_flags_of_run_are_configuration_values():
    flags = ["--train-epochs", "3", "--budgets", "macs=40%", "params=1M", "--amp", "--scale", "0.5", "1", "--lr=1e-1"]
    assert run.overrides(flags) == {
        "train_epochs": 3, "budgets": ["macs=40%", "params=1M"], "amp": True, "scale": [0.5, 1], "lr": "1e-1"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="'stray' is no flag"):
        run.overrides(["stray"])


def test_budgets_are_read_or_refused():
    assert search.read_budgets(["macs=50%", "macs=10M", "params=1M"]) == {"macs": ["50%", "10M"], "params": ["1M"]}
    for wrong in ("50%", "flops=3", "macs="):
        with pytest.raises(BudgetError, match="needed UNIT=AMOUNT"):
            search.read_budgets([wrong])


@pytest.mark.parametrize("name", sorted(loop.REFUSED))
def test_engines_that_cannot_train_a_supernet_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(loop.REFUSED[name], "true")
    with pytest.raises(ConfigError, match=f"{name} cannot train a supernet"):
        loop.make_accelerator(parse("train", write_config(tmp_path)))


# ---------------------------------------------------------------------------------------------------------- data


def make_images(folder, classes, count=4):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(folder / name / f"{index}.png")


def data_args(**changes):
    args = {"dataset": None, "data_dir": None, "in_chans": 3, "num_classes": None, "workers": 0}
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


# ------------------------------------------------------------------------------------------------- training options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sandwich 1", "--sandwich 1: the widest and the narrowest are always trained"),
        ("--sandwich-delay 1", "--sandwich-delay 1.0: needed a share of the steps, from 0 to below 1"),
        ("--sandwich-delay -0.1", "--sandwich-delay -0.1: needed"),
        ("--distill-temperature 0", "--distill-temperature 0.0: needed a number above 0"),
        ("--distill-temperature nan", "--distill-temperature nan: needed"),
        ("--teacher resnet18 --teach-widest 1.5", "--teach-widest 1.5: needed a share from 0 to 1"),
        ("--teach-widest 0.5", "--teach-widest needs an outside --teacher"),
        ("--distill-teacher ema", "--distill-teacher ema needs the moving average: add --model-ema"),
        ("--distill-teacher ema --model-ema --teacher resnet18", "are two teachers: give one"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, "never", *flags.split())
    assert not (tmp_path / "never").exists()


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    args = parse("train", write_config(tmp_path_factory.mktemp("options"), model_kwargs={"drop_rate": 0.5}))
    args.num_classes = 10
    torch.manual_seed(0)
    return common.make_supernet(args).train()


UPDATE = 7


def one_step(folder, supernet, *argv, teacher=None, ema=None):
    """The losses of one step with these flags, of the same supernet and batch, and what took it."""
    args = parse("train", write_config(folder), *argv)
    sandwich = train.Sandwich(loop.make_accelerator(args), args, supernet.space, teacher)
    sandwich.begin(10, ema)
    torch.manual_seed(5)
    inputs, targets = torch.randn(8, 1, 16, 16), torch.randint(0, 10, (8,))
    losses = sandwich(supernet, inputs, targets, UPDATE)
    supernet.zero_grad()
    flat = [torch.full((1,), float("nan")) if loss is None else loss.flatten() for loss in losses.values()]
    return torch.cat(flat).tolist(), sandwich, inputs


@pytest.mark.parametrize(
    ("flags", "differ"),
    [
        ("", []),
        ("--distill-temperature 1 --distill-loss kl --sampler independent --teach-widest 0", []),
        ("--sandwich-delay 0.7", []),  # 7 of 10 steps: over before update 7
        ("--sampler multiplier", [2, 3]),
        ("--distill-temperature 4", [1, 2, 3]),
        ("--distill-loss alpha", [1, 2, 3]),
        ("--distill-loss alpha --distill-temperature 4", [1, 2, 3]),
        ("--regularize-widest-only", [1, 2, 3]),
        ("--smoothing 0.3", [0]),
    ],
)
def test_an_option_changes_what_it_says_and_nothing_else(tmp_path, supernet, flags, differ):
    before, _, _ = one_step(tmp_path, supernet)
    after, _, _ = one_step(tmp_path, supernet, *flags.split())
    assert [index for index in range(4) if before[index] != after[index]] == differ


def test_the_delay_trains_the_widest_alone(tmp_path, supernet):
    before, _, _ = one_step(tmp_path, supernet)
    after, sandwich, inputs = one_step(tmp_path, supernet, "--sandwich-delay", "0.8")
    assert after[0] == before[0]
    assert sandwich(supernet, inputs, torch.zeros(8, dtype=torch.long), UPDATE)["narrowest_loss"] is None
    assert sandwich(supernet, inputs, torch.zeros(8, dtype=torch.long), 8)["narrowest_loss"] > 0
    supernet.zero_grad()


def test_the_sampler_is_the_one_asked_for(tmp_path, supernet):
    def drawn(*argv):
        _, sandwich, _ = one_step(tmp_path, supernet, *argv)
        return [widths for update in range(20) for widths in sandwich.random_widths(update)]

    uniform = {supernet.space.uniform(share / 1000) for share in range(1, 1001)}
    assert drawn("--sampler", "multiplier") == drawn("--sampler", "multiplier")
    assert drawn("--sampler", "multiplier") != drawn("--sampler", "multiplier", "--seed", "3")
    assert set(drawn("--sampler", "multiplier")) <= uniform
    assert not set(drawn()) & uniform


def test_the_subnet_of_a_loss_is_described(tmp_path, supernet):
    losses, sandwich, inputs = one_step(tmp_path, supernet, "--regularize-widest-only", teacher=(teach := Fixed()))
    assert sandwich.describe("narrowest_loss", 0, UPDATE) == "the narrowest subnet"
    for index in (0, 1):
        before, widths = sandwich.describe("random_loss", index, UPDATE).split("widths ")
        assert before == "the random subnet with the "
        with torch.no_grad(), timm_autoslim.sandwich.without_dropout(supernet):
            outputs = supernet(inputs, supernet.space.from_dict(json.loads(widths)))
        assert F.cross_entropy(outputs, teach(inputs).softmax(1)).item() == pytest.approx(losses[2 + index], rel=1e-5)


class Fixed(torch.nn.Module):
    """A teacher that answers by the images' mean."""

    def forward(self, inputs):
        return inputs.mean((1, 2, 3))[:, None] * torch.arange(10.0)


def test_the_moving_average_teaches_if_it_shall(tmp_path, supernet):
    ema = copy.deepcopy(supernet.model).eval()
    flags = ["--regularize-widest-only", "--model-ema"]
    before, _, _ = one_step(tmp_path, supernet, *flags, ema=ema)
    after, _, inputs = one_step(tmp_path, supernet, *flags, "--distill-teacher", "ema", ema=ema)
    assert [index for index in range(4) if before[index] != after[index]] == [1, 2, 3]
    with torch.no_grad(), timm_autoslim.sandwich.without_dropout(supernet):
        outputs = supernet(inputs, supernet.space.min())
        assert after[1] == pytest.approx(F.cross_entropy(outputs, ema(inputs).softmax(1)).item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in ema.parameters())


def save_teacher(folder, num_classes=10, **config):
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=num_classes, in_chans=1).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 16, 16), "num_classes": num_classes, **config}
    save_for_hf(model, folder, safe_serialization=True)
    return model


def test_an_outside_teacher_sees_images_normalised_as_its_own(tmp_path):
    images = torch.rand(3, 1, 16, 16)
    args = parse("train", write_config(tmp_path), "--teacher", str(tmp_path / "teacher"))
    args.num_classes = 10
    for mean, std in (((0.5,), (0.5,)), ((0.2,), (0.8,))):
        model = save_teacher(tmp_path / "teacher", mean=mean, std=std)
        teacher = common.make_teacher(args)
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        with torch.no_grad():
            expected = model((images - mean[0]) / std[0])
            torch.testing.assert_close(teacher((images - 0.5) / 0.5), expected, atol=1e-5, rtol=1e-4)


def test_an_outside_teacher_teaches(tmp_path):
    save_teacher(tmp_path / "teacher")
    options = ["--distill-loss", "alpha", "--channels-last"]
    teacher = ["--teacher", f"local-dir:{tmp_path / 'teacher'}"]
    folders = [
        trained(tmp_path, name, *options, *more)
        for name, more in {"alone": [], "taught": teacher, "both": [*teacher, "--teach-widest", "0.5"]}.items()
    ]
    alone, taught, both = (load_file(folder / "supernet.safetensors") for folder in folders)
    assert taught.keys() == alone.keys()  # the teacher is no part of what is kept
    for first, second in ((alone, taught), (taught, both)):
        assert any(not torch.equal(first[name], second[name]) for name in first)


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    save_teacher(tmp_path / "seven", num_classes=7)
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "seven"), r"has outputs \(7,\), but the data have 10 classes: fine-tune it"),
        (str(tmp_path / "empty"), r"gives no logits of images \(1, 16, 16\): "),
        ("resnet_of_nobody", r"gives no logits of images \(1, 16, 16\): .*resnet_of_nobody"),
        ("test_resnet_nowhere.in1k", r"gives no logits"),
    ):
        args = parse("train", write_config(tmp_path), "--teacher", name)
        args.num_classes = 10
        with pytest.raises(ConfigError, match=message):
            common.make_teacher(args)


def test_help_groups_the_options(capsys):
    with pytest.raises(SystemExit):
        common.parse_args("train", None, ["--help"])
    groups = capsys.readouterr().out.split("\n\n")
    for title, flags in {
        "supernet:": ("--sandwich", "--sampler", "--sandwich-delay", "--regularize-widest-only"),
        "distillation:": (
            "--distill-loss",
            "--distill-temperature",
            "--distill-teacher",
            "--teacher",
            "--teach-widest",
        ),
    }.items():
        begin = next(index for index, group in enumerate(groups) if group.startswith(title))
        text = "\n\n".join(groups[begin : begin + 2])
        assert all(flag in text for flag in flags)


# ---------------------------------------------------------------------------------------------------------- roads


def trained(folder, name, *argv, **changes):
    train.main(["-c", write_config(folder, **changes), "--output", str(folder), "--experiment", name, *argv])
    return folder / name


def launch(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


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


def test_an_interrupted_training_goes_on_exactly(tmp_path, monkeypatch):
    # Four steps an epoch, and the widest alone for the first five: the second part begins in the delay.
    options = ["--model-ema", "--distill-teacher", "ema", "--sandwich-delay", "0.6", "--sampler", "multiplier"]
    whole = trained(tmp_path, "whole", *options, epochs=2)
    save = loop.Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", lambda self, *given: (save(self, *given), interrupt()))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, "parts", *options, epochs=2)
    assert not (tmp_path / "parts" / "supernet.safetensors").exists()
    with pytest.raises(ConfigError, match=r"holds no supernet.safetensors: finish its training first"):
        search.main([str(tmp_path / "parts")])
    with pytest.raises(OutputExistsError, match=r"holds a training \(checkpoints\)"):
        trained(tmp_path, "parts", *options, epochs=2)
    parts = trained(tmp_path, "parts", *options, "--resume", epochs=2)
    first, second = (load_file(folder / "supernet.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "summary.csv").read_text() == (parts / "summary.csv").read_text()
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["epoch-0001"]
    rows = list(csv.DictReader(io.StringIO((whole / "summary.csv").read_text())))
    assert rows[0]["train_narrowest_loss"] == ""
    assert float(rows[1]["train_narrowest_loss"]) > 0


def interrupt():
    raise KeyboardInterrupt


def test_mixup_clipping_and_no_epochs(tmp_path):
    trained(tmp_path, "mixed", "--mixup", "0.2", "--clip-grad", "1", "--channels-last", "--lr-base", "0.1")
    assert (trained(tmp_path, "untrained", epochs=0) / "supernet.safetensors").is_file()


def test_a_diverged_training_stops_and_names_the_way_back(tmp_path):
    start = r"The loss is not finite at step 1 \(epoch 1 of 1\): widest_loss is nan of the widest subnet\."
    with pytest.raises(loop.NotFiniteError, match=start + " There is no checkpoint yet: lower --lr"):
        trained(tmp_path, "broken", lr=1e30)
    good = trained(tmp_path, "good")
    (good / "supernet.safetensors").unlink()
    kept = good / "checkpoints" / "epoch-0000"
    # One step an epoch: its loss is seen before it ruins the weights, so the weights are looked at too.
    message = rf"The weights are not finite after epoch 2 of 2, .* is {kept}: lower --lr, .* and --resume from it"
    with pytest.raises(loop.NotFiniteError, match=message):
        trained(tmp_path, "good", "--resume", "--lr", "1e38", "--weight-decay", "1e6", "--batch-size", "128", epochs=2)
    assert list((good / "checkpoints").iterdir()) == [kept]
    trained(tmp_path, "good", "--resume", epochs=2)
    with pytest.raises(FloatingPointError, match="not finite"):  # an ordinary run's handlers catch it too
        trained(tmp_path, "again", lr=1e30)


def test_the_first_bad_loss_is_named():
    losses = [{"widest_loss": torch.tensor(1.0), "random_loss": torch.tensor([1.0, 2.0])} for _ in range(3)]
    losses[1]["random_loss"][1] = float("inf")
    losses[2]["widest_loss"] = torch.tensor(float("nan"))
    with pytest.raises(loop.NotFiniteError, match=r"at step 8 \(epoch 3\): random_loss is inf of random_loss, 1, 8\."):
        loop._check_losses(list(enumerate(losses, 7)), "epoch 3", lambda *what: ", ".join(map(str, what)))
    loop._check_losses(list(enumerate(losses[:1])), "epoch 3", None)


def test_errors_reach_the_shell_as_messages(tmp_path):
    with pytest.raises(SystemExit, match="ConfigError: it was so"):
        common.command(lambda: (_ for _ in ()).throw(ConfigError("it was so")))
    assert issubclass(ConfigError, AutoSlimError)
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds no args.yaml. Train first"):
        search.main([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"holds no search.json: search first"):
        finetune.main([str(tmp_path)])


def test_two_processes_train_together(tmp_path):
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    recipe = [str(RECIPES / "train.py"), "-c", write_config(tmp_path), "--output", str(tmp_path), "--experiment", "two"]
    recipe += ["--model-ema", "--distill-teacher", "ema", "--sandwich-delay", "0.5"]  # two steps, one of each kind
    done = launch(*launcher, *recipe, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    assert (tmp_path / "two" / "supernet.safetensors").is_file()
