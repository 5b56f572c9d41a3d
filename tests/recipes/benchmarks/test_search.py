"""recipes/benchmarks/search.py: a tiny run from end to end, stopped and gone on with, and its table."""

import importlib.util
import json
import sys

import pytest
import torch
from helpers.recipes import RECIPES
from PIL import Image

TINY = {"model": "resnet10t", "model_kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}}


@pytest.fixture(scope="module")
def bench():
    sys.path.append(str(RECIPES / "benchmarks"))
    spec = importlib.util.spec_from_file_location("search_benchmark", RECIPES / "benchmarks" / "search.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.MODELS = {"tiny": TINY}
    module.SHARED = {**module.SHARED, "limit_train": 60, "held_out": 20, "batch_size": 16, "warmup_epochs": 0}
    module.TRAINING, module.RETRAINING = {"epochs": 1, "lr": 0.05}, {"epochs": 1, "lr": 0.05}
    module.PART, module.BUDGETS = 10, {"macs": ["60%"]}
    return module


@pytest.fixture
def images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 2)):
        for label in range(10):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return tmp_path / "data"


def test_every_method_is_run_once_and_stands_in_the_table(bench, images, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- search -->\nold\n<!-- /search -->\nafter\n")
    argv = ["--data-dir", str(images), "--output", str(tmp_path / "out"), "--seeds", "0", "1", "--docs", str(page)]
    retrain = bench.Bench._retrain
    done = []

    def stopped(self, *given):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(retrain(self, *given))

    with monkeypatch.context() as patch:
        patch.setattr(bench.Bench, "_retrain", stopped)
        with pytest.raises(KeyboardInterrupt):
            bench.main(argv)
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    bench.main(argv)
    assert all(path.read_bytes() == content for path, content in first.items() if path.exists())
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("result.json")]
    repeated = ("searched", "reference, error", "reference, per cost", "uniform")
    assert sorted((r["method"], r["seed"]) for r in results) == sorted(
        [(m, 0) for m in ("random", "evolutionary", "importance")] + [(m, s) for m in repeated for s in (0, 1)]
    )
    text = page.read_text()
    assert text.startswith("before\n<!-- search -->\n### tiny\n")
    assert text.endswith("<!-- /search -->\nafter\n")
    assert "old" not in text
    for method in bench.METHODS:
        found = json.loads((tmp_path / "out" / "tiny" / f"search-{bench.slug(method)}.json").read_text())
        network = found["networks"][0]
        tested = [r["top1"] for r in results if r["method"] == method]
        assert f"| {method} | {found['evaluations']} | {found['evaluated_macs'] / 1e12:.3f}T | " in text
        row = next(line for line in text.splitlines() if line.startswith(f"| 60% | {method} |"))
        assert f"| {network['error']:.4f} | {sum(tested) / len(tested):.2f}" in row
        assert row.endswith(f"| {len(tested)} |")
        assert (" ± " in row) == (len(tested) > 1)


def test_an_empty_folder_has_an_empty_table(bench, tmp_path, capsys):
    bench.main(["--data-dir", "nowhere", "--output", str(tmp_path), "--only-table"])
    assert capsys.readouterr().out == "\n"
