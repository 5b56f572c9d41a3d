"""Copies of the recipes, for who wants to change them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from timm_autoslim.errors import OutputExistsError

RECIPES = Path(__file__).resolve().parents[1]


def copy_recipes(folder: Path) -> list[Path]:
    """Copy the recipes, what they share and their configurations to a new folder; return the scripts.

    The copies import each other, not the recipes of the package: what is changed in them takes effect.

    Raises:
        OutputExistsError: the folder holds something already.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise OutputExistsError.at(str(folder), got="a file or a folder that holds files", needed="a new folder")
    shutil.copytree(RECIPES, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"^from timm_autoslim\.recipes\.(?=\w)", "from ", text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")
    (folder / "__init__.py").unlink()
    return sorted(folder.glob("*.py"))
