"""recipes/benchmarks/search.py: a tiny run from end to end, stopped and gone on with, and its table."""

import json

import pytest
import torch
from PIL import Image

from timm_autoslim import SearchResult
from timm_autoslim.recipes.benchmarks import search

TINY = {"model": "resnet10t", "model_kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(search, "MODELS", {"tiny": TINY})
    shared = {"limit_train": 60, "held_out": 20, "batch_size": 16, "warmup_epochs": 0}
    monkeypatch.setattr(search, "SHARED", {**search.SHARED, **shared})
    monkeypatch.setattr(search, "TRAINING", {"epochs": 1, "lr": 0.05})
    monkeypatch.setattr(search, "RETRAINING", {"epochs": 1, "lr": 0.05})
    monkeypatch.setattr(search, "PART", 10)
    monkeypatch.setattr(search, "BUDGETS", {"macs": ["60%"]})


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


@pytest.mark.slow
def test_every_method_is_run_once_and_stands_in_the_table(images, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- search -->\nold\n<!-- /search -->\nafter\n")
    argv = ["--data-dir", str(images), "--output", str(tmp_path / "out"), "--seeds", "0", "1", "--docs", str(page)]
    measure_top1 = search.measure_top1
    done = []

    def stop_after_three(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(measure_top1(*args))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(search, "measure_top1", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            search.main(argv)
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    search.main(argv)
    assert all(path.read_bytes() == content for path, content in first.items() if path.exists())
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("result.json")]
    repeated = ("searched", "reference, loss", "reference, per cost", "uniform")
    assert sorted((r["method"], r["seed"]) for r in results) == sorted(
        [(m, 0) for m in ("random", "evolutionary", "importance")] + [(m, s) for m in repeated for s in (0, 1)]
    )
    text = page.read_text()
    assert text.startswith("before\n<!-- search -->\n### tiny\n")
    assert text.endswith("<!-- /search -->\nafter\n")
    assert "old" not in text
    for method in search.METHODS:
        result = SearchResult.load(tmp_path / "out" / "tiny" / f"search-{search.make_slug(method)}.json")
        (network,) = result.networks
        top1 = [r["top1"] for r in results if r["method"] == method]
        assert f"| {method} | {result.evaluations} | {result.evaluated_macs / 1e12:.3f}T | " in text
        row = next(line for line in text.splitlines() if line.startswith(f"| 60% | {method} |"))
        assert f"| {network.loss:.4f} | {sum(top1) / len(top1):.2f}" in row
        assert row.endswith(f"| {len(top1)} |")
        assert (" ± " in row) == (len(top1) > 1)


def test_an_empty_folder_has_an_empty_table(tmp_path, capsys):
    search.main(["--data-dir", "nowhere", "--output", str(tmp_path), "--only-table"])
    assert capsys.readouterr().out == "\n"
