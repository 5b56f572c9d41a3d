"""What only a GPU can show: the benchmark runs on a CPU too, small, and writes its rows and tables."""

import argparse
import json

import pytest
from helpers.recipes import RECIPES, launch

from timm_autoslim.recipes.benchmarks.gpu import PARTS, make_tables, run_cases
from timm_autoslim.recipes.benchmarks.lib.gpu_checks import gap


def make_options(tmp_path, **changes):
    options = {"results": tmp_path / "rows.jsonl", "device": "cpu", "toy": True, "cases": None, "limit": None,
               "data_dir": None, "checkpoints": tmp_path / "stages", "epochs": (1, 1)}  # fmt: skip
    return argparse.Namespace(**options | changes)


def read(options):
    return [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]


def test_a_case_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    def measure(name, options):
        yield {"question": "none", "value": 1}
        if name == "bad":
            raise ValueError("of this case")

    part = PARTS["speed"]
    monkeypatch.setitem(PARTS, "speed", type(part)(lambda _: ["bad", "good"], measure, part.seconds))
    options = make_options(tmp_path)
    run_cases("speed", 0, options)
    rows = read(options)
    assert [(row["case"], row.get("error"), row.get("done")) for row in rows] == [
        ("bad", None, None), ("bad", "ValueError: of this case", None), ("good", None, None), ("good", None, True),
    ]  # fmt: skip
    run_cases("speed", 0, options)  # only what has not come to its end is measured again
    assert [row["case"] for row in read(options)[4:]] == ["bad", "bad"]
    assert make_tables(rows) == "speed, bad: ValueError: of this case"


def test_a_difference_is_relative_to_the_largest_entry():
    import torch

    assert gap(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0])) == pytest.approx(0.125)


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path):
    results = tmp_path / "rows.jsonl"
    cases = ["vit_tiny_patch16_224", "resnet10t", "overflow", "coarse"]
    flags = ["--device", "cpu", "--toy", "--limit", "500", "--results", results, "--cases", *cases]
    done = launch(str(RECIPES / "benchmarks" / "gpu.py"), *map(str, flags), "--parts", *PARTS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert not [row for row in rows if "error" in row]
    finished = {(row["part"], row["case"]) for row in rows if row.get("done")}
    assert finished == {
        ("equality", "vit_tiny_patch16_224"), ("speed", "resnet10t"), ("widths", "coarse"), ("search", "resnet10t"),
        ("training", "overflow"), ("memory", "resnet10t"),
    }  # fmt: skip
    equal = [row for row in rows if row.get("question") == "equality"]
    assert all(row["subnet_equal"] and row["reload_equal"] and not row["gradients_different"] for row in equal)
    assert "| vit_tiny_patch16_224 | float32 | bit for bit | bit for bit | 0 of " in done.stdout


def test_a_training_that_was_interrupted_goes_on_from_its_file(tmp_path):
    import functools

    import torch
    from torch import nn
    from torch.nn import functional as F

    from timm_autoslim.recipes.benchmarks.lib.fitting import Pictures, fit

    pictures = Pictures(torch.randn(24, 3, 8, 8), torch.randint(3, (24,)))
    networks = {}

    def stop(epoch, loss):
        if epoch == 3:
            raise KeyboardInterrupt

    for name, on_epoch in (("whole", None), ("interrupted", stop), ("resumed", None)):
        torch.manual_seed(0)
        networks[name] = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
        train = functools.partial(
            fit, networks[name], pictures, lambda images: images,
            lambda model, images, targets: F.cross_entropy(model(images), targets),
            functools.partial(torch.optim.SGD, momentum=0.9), epochs=5, batch=8, rate=0.1, on_epoch=on_epoch,
            checkpoint=tmp_path / ("whole.pt" if name == "whole" else "part.pt"),
        )  # fmt: skip
        if on_epoch:
            with pytest.raises(KeyboardInterrupt):
                train()
        else:
            train()
    states = [networks[name].state_dict() for name in ("whole", "interrupted", "resumed")]
    assert all(torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert not torch.equal(states[0]["0.weight"], states[1]["0.weight"])
