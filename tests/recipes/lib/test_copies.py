"""Copies of the recipes; that they run is seen in tests/test_wheel.py."""

import pytest
from helpers.recipes import RECIPES

from timm_autoslim.errors import OutputExistsError
from timm_autoslim.recipes.lib.copies import copy_recipes


def test_copies_import_each_other_and_not_the_package(tmp_path):
    folder = tmp_path / "mine"
    scripts = copy_recipes(folder)
    assert [path.name for path in scripts] == sorted(path.name for path in RECIPES.glob("[!_]*.py"))
    assert (folder / "configs" / "digits.yaml").is_file()
    assert not (folder / "benchmarks").exists()
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert "from timm_autoslim.recipes" not in text
        compile(text, path, "exec")
    assert "from lib.configuration import" in (folder / "train.py").read_text()


def test_nothing_is_replaced(tmp_path):
    (tmp_path / "mine.py").touch()
    for folder in (tmp_path, tmp_path / "mine.py"):
        with pytest.raises(OutputExistsError, match="needed: a new folder"):
            copy_recipes(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
