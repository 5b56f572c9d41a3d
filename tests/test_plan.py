"""The house plan: every room of the package imports only from rooms above it."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import timm_autoslim

PACKAGE = Path(timm_autoslim.__file__).parent

# From top to bottom. Slicing knows nothing but tensors, so tracing may stand on it (to prove its graph); costs are read
# off the graph alone, so the space may stand on them (to print its table).
ROOMS = [
    "errors",
    "arguments",
    "atomic",
    "pieces",
    "slicing",
    "tracing.labels",
    "tracing.sizes",
    "tracing.flow",
    "tracing.ops",  # a folder, and one room
    "tracing.graph",
    "tracing.twin",
    "tracing.prove",
    "tracing.watch",
    "tracing.trace",
    "residual",
    "terms",
    "tape",
    "costs",
    "space",
    "importance",
    "bases",
    "bounds",
    "recipe",
    "supernet",
    "stopwatch",
    "kernels",
    "latency",
    "calibration",
    "sandwich",
    "scoring",
    "slimming",
    "baselines",
    "report",
    "proof",
    "folder",
    "backbones",
    "registry",
    "card",
    "pruned",
    "artifact",
    "hub",
]
# what the rooms above are for: it imports from all of them, and none of them from it
FRONT_DOORS = ["__init__", "__main__"]


def files():
    """Return every file of the package, by the name that it is imported by."""
    paths = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    return {".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts): p for parts, p in paths.items()}


def room_of(name):
    """Return the room that a file is, or is a part of."""
    return next((room for room in ROOMS if name == room or name.startswith(f"{room}.")), name)


def _is_for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node):
    """Walk the tree, function bodies included, but leave out what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not _is_for_types_only(child):
            yield child
            yield from _statements(child)


def imported(source, rooms, package=()):
    """Return the names of the rooms that a file imports; relative imports are seen from `package`."""
    found = set()
    for node in _statements(ast.parse(source)):
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
                found.add(next((".".join(parts[1:e]) for e in ends if ".".join(parts[1:e]) in rooms), "__init__"))
    return found


def imports_by_room():
    """Return, for every room, those that its files import from."""
    every = files()
    found = {}
    for name, path in every.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        rooms = {room_of(other) for other in imported(path.read_text(), every, package)} - {room_of(name)}
        found.setdefault(room_of(name), set()).update(rooms)
    return found


def test_the_plan_names_every_room():
    assert sorted(set(imports_by_room()) - set(FRONT_DOORS)) == sorted(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(room):
    wrong = imports_by_room()[room] - set(ROOMS[: ROOMS.index(room)])
    assert not wrong, f"{room} imports {sorted(wrong)}, which do not stand above it"


def test_loading_a_searched_model_needs_neither_tracing_nor_a_supernet():
    imports = imports_by_room()
    reached, waiting = set(), ["registry"]
    while waiting:
        room = waiting.pop()
        reached.add(room)
        waiting.extend(imports[room] - reached)
    assert reached <= {"registry", "backbones", "folder", "recipe", "bounds", "bases", "slicing", "pieces", "errors"}
    # and so for who imports the package, in a new process: nothing else is imported along
    source = "import sys, timm_autoslim; print(*(m for m in sys.modules if m.startswith('timm_autoslim.')))"
    shown = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split()
    assert {name.removeprefix("timm_autoslim.") for name in shown} == reached


def test_every_public_name_is_found_where_the_type_checker_finds_it():
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in source.body if _is_for_types_only(node))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted([*typed, "AutoSlimError"]) == timm_autoslim.__all__
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
        own = {"__main__": {"argparse"}, "card": {"matplotlib"}, "report": {"matplotlib", "jinja2"}}
        assert not tops & (foreign - own.get(name, set())), name


def test_the_reader_of_imports_sees_every_kind():
    rooms = {"slicing": 0, "tracing.labels": 0, "space": 0, "costs": 0, "errors": 0}
    source = """
from __future__ import annotations
import numpy, timm_autoslim.tracing.labels
from timm_autoslim import slicing
from timm_autoslim.space import Widths
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from timm_autoslim.registry import build_slimmed
def late():
    from ..costs import cost
    from ..errors import WidthError as error
"""
    assert imported(source, rooms, ["tracing"]) == set(rooms)
    assert imported("from timm_autoslim import convert", rooms) == {"__init__"}
    assert imported("from . import slicing\nfrom .costs import cost", rooms) == {"slicing", "costs"}
