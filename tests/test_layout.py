"""How the tests are laid out: a mirror of the package, beside helpers that are no tests."""

import ast
from pathlib import Path

import timm_autoslim

TESTS = Path(__file__).parent
HELPERS = TESTS / "helpers"
PACKAGE = Path(timm_autoslim.__file__).parent
FILES = sorted(TESTS.rglob("test_*.py"))


def names_in(path):
    """Return all names that a file reads: variables, attributes and what it imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_test_file_imports_another():
    modules = {path.stem for path in FILES} | {"tests"}
    wrong = {(str(path.relative_to(TESTS)), name) for path in FILES for name in imported_modules(path)
             if modules.intersection(name.split("."))}  # fmt: skip
    assert not wrong


def test_helpers_hold_no_tests_and_nothing_that_nobody_uses():
    files = [*FILES, *HELPERS.rglob("*.py")]
    for path in HELPERS.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        names |= {
            t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
        }
        assert not {name for name in names if name.startswith(("test_", "Test"))}
        print(path.name, {n for n in names if not any(n in names_in(f) for f in files if f != path)})


def test_every_file_of_the_package_has_its_tests_at_the_mirrored_place():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        if path.name != "__init__.py" and parts[0] != "recipes":
            mirrored = TESTS.joinpath(*parts[:-1], f"test_{path.stem.strip('_')}.py")
            if not mirrored.exists():
                print(mirrored.relative_to(TESTS))
