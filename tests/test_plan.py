"""The plan of the house: every wing imports only from those before it, and no two files import each other."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import timm_autoslim

PACKAGE = Path(timm_autoslim.__file__).parent

# From the ground up. Imports that only a type checker reads count like all others.
WINGS = ["errors", "utils", "slicing", "tracing", "artifact", "supernet", "costs", "training", "slimming"]
# They import from all wings, and no wing from them.
FRONT_DOORS = ["__init__", "__main__", "files", "plot"]


def files():
    """Return every file of the library, by the name that it is imported by; the recipes are none of it."""
    paths = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    names = {".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts): p for parts, p in paths.items()}
    return {name: path for name, path in names.items() if wing_of(name) != "recipes"}


def wing_of(name):
    return name.partition(".")[0]


def imported(source, modules, package=()):
    """Return the modules that a file imports; relative imports are seen from `package`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["timm_autoslim", *package][: len(package) + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "timm_autoslim":
                # the longest beginning that is a file; the rest is a name in it
                ends = range(len(parts), 0, -1)
                found.add(next((".".join(parts[1:e]) for e in ends if ".".join(parts[1:e]) in modules), "__init__"))
    return found


@functools.cache
def imports():
    """Return, for every file, the files that it imports from."""
    every = files()
    found = {}
    for name, path in every.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found[name] = imported(path.read_text(), every, package) - {name}
    return found


def test_every_file_lies_in_a_wing():
    assert {wing_of(name) for name in files()} == {*WINGS, *FRONT_DOORS}


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_from_those_before_it(wing):
    allowed = set(WINGS[: WINGS.index(wing) + 1])
    wrong = {f"{name} imports {other}" for name, others in imports().items() if wing_of(name) == wing
             for other in others if wing_of(other) not in allowed}  # fmt: skip
    assert not wrong


def test_no_files_import_each_other():
    graph = {name: others for name, others in imports().items() if name not in FRONT_DOORS}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_package_hides_a_public_function():
    packages = {name for name, path in files().items() if path.name == "__init__.py"}
    assert packages.isdisjoint(timm_autoslim.__all__)


LOADING = {"errors", "utils", "slicing", "artifact"}  # the wings that loading needs: neither tracing nor a supernet


def test_loading_a_slim_model_imports_few_wings():
    every, waiting, loaded = files(), ["__init__"], set()
    while waiting:
        name = waiting.pop()
        if name in loaded:
            continue
        loaded.add(name)
        lines = [
            node for node in ast.parse(every[name].read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        waiting += imported("\n".join(map(ast.unparse, lines)), every)
    assert {wing_of(name) for name in loaded} - {"__init__"} == LOADING


@pytest.mark.slow
def test_loading_a_slim_model_imports_few_wings_in_a_new_process():
    source = "import sys, timm_autoslim; print(*(m for m in sys.modules if m.startswith('timm_autoslim.')))"
    shown = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split()
    assert {wing_of(name.removeprefix("timm_autoslim.")) for name in shown} == LOADING


def test_every_public_name_is_found_where_the_type_checker_finds_it():
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in source.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted([*typed, "AutoSlimError"]) == sorted(timm_autoslim.__all__)
    for name, module in typed.items():
        assert getattr(timm_autoslim, name) is getattr(importlib.import_module(module), name)
    assert set(timm_autoslim.__all__) <= set(dir(timm_autoslim))
    with pytest.raises(AttributeError, match="no attribute 'covert'"):
        timm_autoslim.covert  # noqa: B018


def test_the_library_knows_neither_recipes_nor_their_tools():
    for name, path in files().items():
        tops = {
            (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
            for alias in node.names
        }
        foreign = {"accelerate", "argparse", "recipes", "yaml", "sklearn", "matplotlib", "jinja2"}
        # figures are drawn where matplotlib is installed, and the report is loaded only when asked for
        own = {
            "__main__": {"argparse"},
            "artifact.card": {"matplotlib"},
            "slimming.report": {"jinja2"},
            "slimming.figures": {"matplotlib"},
        }
        assert not tops & (foreign - own.get(name, set())), name


def test_the_library_imports_all_that_it_requires():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)[1]
    names = [re.match(r"[\w-]+", name)[0].replace("-", "_") for name in re.findall(r'"([^"]+)"', required)]
    assert len(names) > 5
    source = "\n".join(path.read_text() for path in files().values())
    assert [name for name in names if not re.search(rf"^ *(?:import|from) {name}\b", source, re.MULTILINE)] == []


def test_the_reader_of_imports_sees_every_kind():
    modules = {"slicing": 0, "tracing.labels": 0, "space": 0, "costs": 0, "errors": 0, "load": 0}
    source = """
from __future__ import annotations
import numpy, timm_autoslim.tracing.labels
from timm_autoslim import slicing
from timm_autoslim.space import Widths
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from timm_autoslim.load import build_slimmed
def late():
    from ..costs import cost
    from ..errors import WidthError as error
"""
    assert imported(source, modules, ["tracing"]) == set(modules)
    assert imported("from timm_autoslim import convert", modules) == {"__init__"}
    assert imported("from . import slicing\nfrom .costs import cost", modules) == {"slicing", "costs"}
