"""The recipes stand on the public interface alone, and are a package wherever timm_autoslim is."""

import ast
import importlib
from pathlib import Path

import pytest
from helpers.recipes import RECIPES

import timm_autoslim
import timm_autoslim.recipes
from timm_autoslim.recipes.benchmarks.lib.ecosystem import PACKAGES

FILES = sorted(RECIPES.rglob("*.py"))
MODULES = {"timm_autoslim", "timm_autoslim.errors", "timm_autoslim.files"}  # of which recipes may import names
NAMES = {None, "errors", "files", *timm_autoslim.__all__}  # which they may take from timm_autoslim itself


def list_imports(source):
    """Return what a file takes from timm_autoslim: (module, name)."""
    pairs = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports do not work in a script"
            pairs += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "timm_autoslim":
            pairs.append(("timm_autoslim", node.attr))
    return [(module, name) for module, name in pairs if module.partition(".")[0] == "timm_autoslim"]


def find_inner(source):
    """Return what a file takes from inside the library."""
    return [
        (module, name) for module, name in list_imports(source)
        if not module.startswith("timm_autoslim.recipes.")
        and (module not in MODULES or (module == "timm_autoslim" and name not in NAMES))
    ]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipes_use_public_names_alone(path):
    source = path.read_text(encoding="utf-8")
    assert not find_inner(source)
    assert "sys.path" not in source


def test_the_reader_of_imports_sees_every_kind():
    inner = [
        "import timm_autoslim.costs", "from timm_autoslim.costs.cost import cost", "from timm_autoslim import slicing",
        "import timm_autoslim\ntimm_autoslim.costs.cost",
    ]  # fmt: skip
    assert all(find_inner(source) for source in inner)
    public = [
        "import timm_autoslim", "from timm_autoslim import cost", "from timm_autoslim.errors import ConfigError",
        "from timm_autoslim.recipes.lib.flags import FLAGS", "import timm_autoslim\ntimm_autoslim.cost",
    ]  # fmt: skip
    assert not any(find_inner(source) for source in public)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_file_is_a_module_of_the_package(path):
    name = ".".join(["timm_autoslim.recipes", *path.relative_to(RECIPES).with_suffix("").parts]).removesuffix(
        ".__init__"
    )
    extra = {"deploy", *(package.file for package in PACKAGES.values() if not package.is_installed())}
    if path.stem not in extra:  # which need further packages
        assert Path(importlib.import_module(name).__file__).resolve() == path


def test_the_package_is_the_folder():
    assert Path(timm_autoslim.recipes.__file__).resolve().parent == RECIPES
    assert (Path(timm_autoslim.__file__).parent / "recipes" / "configs" / "digits.yaml").is_file()
