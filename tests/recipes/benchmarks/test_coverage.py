"""The sweep over models: one process each, resumable, and a page of results."""

import json

import pytest
from helpers.recipes import RECIPES, launch


def run(*arguments):
    return launch(str(RECIPES / "benchmarks" / "coverage.py"), *map(str, arguments))


@pytest.mark.slow
def test_a_sweep_measures_checks_resumes_and_writes_its_page(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text(json.dumps({"name": "test_vit", "family": "VisionTransformer", "error": "from before"}) + "\n")
    names = ["test_vit", "test_convnext", "torchvision/no_such_model"]
    done = run("--results", results, "--table", page, "--equal", "1", "--models", *names)
    assert done.returncode == 0, done.stderr
    assert "1 of 3 convert; not: test_vit, torchvision/no_such_model" in done.stdout
    old, good, bad = sorted(map(json.loads, results.read_text().splitlines()), key=lambda r: names.index(r["name"]))
    assert old["error"] == "from before"  # measured already, so not again
    assert "ArtifactError" in bad["error"]
    assert good["equal"] is True
    assert good["family"] == "ConvNeXt"
    assert 0.2 < good["half_macs"] < 0.5
    assert good["min_macs"] < good["half_macs"]
    text = page.read_text()
    assert "- 1 of 3 models convert." in text
    assert "| ConvNeXt | test_convnext | " in text
    assert "from before" in text
    late = run("--results", results, "--table", page, "--seconds", "0", "--models", *names, "test_resnet")
    assert late.returncode == 0, late.stderr
    last = json.loads(results.read_text().splitlines()[-1])
    assert last == {"name": "test_resnet", "error": "no result within 0 s"}
    assert len(results.read_text().splitlines()) == 4  # the others were not measured again
    assert "- 1 of 4 models convert." in page.read_text()
