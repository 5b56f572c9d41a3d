"""What README and docs show is run, and what they point to is there."""

import re
import sys
from pathlib import Path

import pytest

from timm_autoslim.__main__ import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {"__name__": "__main__"})


def test_readme_shows_the_library_in_use():
    assert blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    files = re.findall(r"\b(?:recipes|tests|docs)/[\w/.]+\.(?:py|yaml|sh|md)\b", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert not missing


def test_no_placeholder_is_left():
    for page in PAGES:
        assert "RESULT_" not in page.read_text(encoding="utf-8"), page


def test_inspect_prints_groups_reach_and_reasons(capsys):
    assert main(["inspect", "resnet10t", "--modules"]) == 0
    out = capsys.readouterr().out
    assert "10 groups" in out
    assert "at half width" in out
    assert "an output of the model" in out
    assert re.search(r"^ *[\d,]+ +[\d,]+  layer1\.0\.conv1$", out, re.MULTILINE)


def test_inspect_takes_torchvision_models(capsys):
    assert main(["inspect", "torchvision/squeezenet1_1", "--size", "64"]) == 0
    assert "features.3.squeeze" in capsys.readouterr().out


def test_inspect_refuses_an_unknown_model_by_name(capsys):
    assert main(["inspect", "resnet81"]) == 1
    captured = capsys.readouterr()
    assert "resnet81" in captured.err
    assert not captured.out


def test_every_public_name_has_a_docstring():
    import timm_autoslim

    assert sys.modules["timm_autoslim"].__doc__
    for name in timm_autoslim.__all__:
        assert getattr(timm_autoslim, name).__doc__, name
