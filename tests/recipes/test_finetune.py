"""recipes/finetune.py: what it exports is calibrated, and has the accuracy that it tells, by timm's validate.py too."""

import json
import re

import pytest
import timm
import yaml
from helpers import recipes
from helpers.recipes import RECIPES, ROOT, parse
from helpers.searches import rename_method
from helpers.subprocesses import run_apart
from PIL import Image
from sklearn.datasets import load_digits

from timm_autoslim import HeldOut, baseline
from timm_autoslim.__main__ import main as run_command_line
from timm_autoslim.recipes import finetune, train
from timm_autoslim.recipes.lib.images import open_images
from timm_autoslim.recipes.lib.loaders import make_evaluation_loader
from timm_autoslim.recipes.lib.models import load_supernet
from timm_autoslim.recipes.lib.processes import make_accelerator
from timm_autoslim.recipes.lib.run_folder import read_args
from timm_autoslim.recipes.lib.validation import evaluate

SHORT = {"limit_train": 1.0, "held_out": 32, "calibration_images": 64, "batch_size": 32, "workers": 0, "threads": 1,
         "amp": False, "train_epochs": 1, "finetune_epochs": 1, "train_warmup_epochs": 0, "val_widths": []}  # fmt: skip
TINY = {"model": "resnet10t", "model_kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8}, "lr": 0.05,
        "color_jitter": 0.0, "hflip": 0.0}  # fmt: skip
# What resnet10t's own settings say is 176 pixels, 224 in a test, bicubic, ImageNet's colours.
CASES = {
    "gray": TINY | {"in_chans": 1, "img_size": 32},
    "cropped": TINY | {"img_size": 24, "crop_pct": 0.6, "interpolation": "bilinear", "mean": [0.1] * 3},
    "squashed": TINY | {"img_size": 24, "crop_mode": "squash", "std": [0.1, 0.2, 0.3]},
    "of the model": TINY | {"img_size": None, "limit_train": 96},
    "transformer": {"model": "test_vit", "model_kwargs": {"img_size": 32}, "img_size": 32, "opt": "adamw", "lr": 1e-3},
}
CONFIGS = ("digits", "cifar10_resnet", *(p.stem for p in sorted((RECIPES / "configs").glob("small_*.yaml"))))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Digits as class folders, wider than high, so that crops differ."""
    folder = tmp_path_factory.mktemp("digits")
    pixels, targets = load_digits(return_X_y=True)
    for index, (values, target) in enumerate(zip(pixels[:500], targets[:500], strict=True)):
        place = folder / ("validation" if index % 5 == 0 else "train") / str(target)
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((values.reshape(8, 8) * (255 / 16)).astype("uint8"))
        image.resize((60, 40)).save(place / f"{index}.png")
    return folder


def export_network(folder, settings):
    """Train a supernet, narrow it uniformly, fine-tune and export; return the exported folder."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    train.main(["-c", str(config), "--output", str(folder), "--experiment", "run"])
    run = folder / "run"
    args = read_args(run, parse("finetune", str(config), str(run)))
    result = baseline(load_supernet(run, args), ["macs<=50%"], HeldOut([0], lambda *_: 1.0), "uniform")
    rename_method(result, "searched").save(run / "search" / "searched.json")
    finetune.main([str(run), "-c", str(config), "--network", "macs-50pct-searched"])
    return run / "exported" / "macs-50pct-searched"


def test_a_network_is_fine_tuned_calibrated_tested_and_exported(tmp_path):
    exported = export_network(tmp_path, recipes.TINY)
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    assert model.bn1.num_batches_tracked == recipes.TINY["calibration_images"] / recipes.TINY["batch_size"]
    args = read_args(tmp_path / "run", parse("finetune", str(tmp_path / "config.yaml"), str(tmp_path / "run")))
    accelerator = make_accelerator(args)
    test = evaluate(accelerator, model, accelerator.prepare(make_evaluation_loader(args, open_images(args).test)))
    result = json.loads((exported / "result.json").read_text())
    assert {key: result[key] for key in test} == pytest.approx(test)


def validate(folder, data, *flags):
    """Return what a script that makes the calls of timm's validate.py finds."""
    script = str(ROOT / "tests" / "helpers" / "timm_scripts" / "validate.py")
    argv = [script, str(data), "--model", f"local-dir:{folder}", "--pretrained", "-b", "50", *flags]
    done = run_apart(run_script, argv, cwd=folder)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_script(argv):
    return run_command_line(["run", *argv])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *CONFIGS])
def test_timm_s_validate_finds_the_accuracy_of_the_card(images, tmp_path, name):
    path = RECIPES / "configs" / f"{name}.yaml"
    settings = CASES[name] if name in CASES else yaml.safe_load(path.read_text())
    exported = export_network(tmp_path, settings | SHORT | CASES.get(name, {}) | {"data_dir": str(images)})
    args = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    card = (exported / "README.md").read_text()
    accuracy = float(re.search(r"\| test top-1, % \| ([\d.]+) \|", card).group(1))
    cost = json.loads((exported / "result.json").read_text())
    for flags in ([], ["--use-train-size"], ["--test-pool"]):
        facts = validate(exported, images, *flags)
        assert facts["top1"] == pytest.approx(accuracy, abs=0.01)
        assert facts["params"] == cost["params"]
        size = [args["in_chans"], args["img_size"], args["img_size"]]
        expected = {key: args[key] for key in ("crop_pct", "crop_mode", "interpolation", "mean", "std")}
        assert facts["input"] == expected | {"input_size": size}
        assert not facts["pooled"]
    assert f"| this model | {cost['macs']:,} | {cost['params']:,} |" in card
    assert f"Input: {' x '.join(map(str, size))}." in card
