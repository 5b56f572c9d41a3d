"""What the model's code says: where a line is, and the tables that it looks something up in."""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import sys
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

_METHODS = frozenset({"get", "pop", "setdefault", "__getitem__", "__contains__"})
_TABLES = (dict, set, frozenset)


@cache
def format_line(path: str, number: int) -> str:
    """Return `file:line`, with the file as seen from the working directory or from the installed packages."""
    folders = [Path.cwd(), *map(Path, sys.path)]
    # site-packages first, for they may lie in the working directory
    for folder in sorted(folders, key=lambda folder: not folder.name.endswith("-packages")):
        with contextlib.suppress(ValueError):
            return f"{Path(path).relative_to(folder)}:{number}"
    return f"{path}:{number}"


def find_tables(frame: Any) -> list[Collection[Any]]:
    """Return the keys of the dicts and sets that the running line of a frame looks something up in.

    They are read from the source: a table has a name, is an attribute, or is written there. Others are not found.
    """
    expressions = _list_lookups(frame.f_code.co_filename).get(frame.f_lineno, ())
    return [table for table in (_read(node, frame) for node in expressions) if isinstance(table, _TABLES)]


def has_lookup(frame: Any) -> bool:
    """Whether the running line of a frame looks something up."""
    return frame.f_lineno in _list_lookups(frame.f_code.co_filename)


@cache
def _list_lookups(path: str) -> dict[int, list[ast.expr]]:
    """Return by line of a file the expressions that something is looked up in; none if there is no source."""
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return {}
    lookups: dict[int, list[ast.expr]] = {}
    for node in ast.walk(tree):
        for table in _get_tables(node):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):  # type: ignore[attr-defined]
                lookups.setdefault(line, []).append(table)
    return lookups


def _get_tables(node: ast.AST) -> Iterator[ast.expr]:
    """Yield what a node of the source looks something up in."""
    if isinstance(node, ast.Subscript):
        yield node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
        yield node.func.value
    elif isinstance(node, ast.Compare):
        for operator, table in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, (ast.In, ast.NotIn)):
                yield table


def _read(node: ast.expr, frame: Any) -> Any:
    """Return the value of a name, of an attribute, or of a table whose keys are written there; else None."""
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Attribute):
        owner = _read(node.value, frame)
        return getattr(owner, "__dict__", {}).get(node.attr, inspect.getattr_static(owner, node.attr, None))
    try:
        if isinstance(node, ast.Dict):
            return {ast.literal_eval(key) for key in node.keys if key is not None}
        return ast.literal_eval(node)
    except ValueError:
        return None
