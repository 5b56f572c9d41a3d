"""How the tests are laid out: a mirror of the package, beside helpers that are no tests."""

import ast
from pathlib import Path

import timm_autoslim

TESTS = Path(__file__).parent
PACKAGE = Path(timm_autoslim.__file__).parent
FILES = sorted(TESTS.rglob("test_*.py"))


def modules_that_it_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(alias.name for alias in node.names))


def test_no_test_file_imports_another():
    modules = {path.stem for path in FILES}
    wrong = {(str(path.relative_to(TESTS)), name) for path in FILES for name in modules_that_it_imports(path)
             if modules.intersection(name.split("."))}  # fmt: skip
    assert not wrong


def test_what_lies_beside_the_tests_holds_none():
    for path in TESTS.rglob("*.py"):
        if path not in FILES:
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree), f"{path}: needed: a docstring that says what is in it"
            names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            assert not [name for name in names if name.startswith(("test_", "Test"))], path


def test_every_file_has_its_tests_at_the_mirrored_place():
    """But for the benchmarks, which are recipes that nothing is built on."""
    recipes = PACKAGE / "recipes"  # a link, which Python 3.13 does not follow by itself
    missing = []
    for path in {*PACKAGE.rglob("*.py"), *recipes.glob("*.py"), *(recipes / "lib").glob("*.py")}:
        parts = path.relative_to(PACKAGE).parts
        mirrored = TESTS.joinpath(*parts[:-1], f"test_{path.stem.strip('_')}.py")
        if path.name != "__init__.py" and parts[:2] != ("recipes", "benchmarks") and not mirrored.exists():
            missing.append(str(mirrored.relative_to(TESTS)))
    assert not missing
