"""Globs of module paths, as users write them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable


def matches(path: str, glob: str) -> bool:
    """Whether a glob matches a module's path, or the path of a module that holds it.

    Example:
        >>> matches("layer1.0.conv1", "layer1"), matches("layer1.0.conv1", "*.conv1"), matches("layer10", "layer1")
        (True, True, False)
    """
    names = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(names[:count]), glob) for count in range(len(names), 0, -1))


def describe_near(glob: str, paths: Iterable[str]) -> str:
    """Say which paths are most like a glob that matches none, those of modules that hold others included."""
    names = [path.split(".") for path in paths]
    every = dict.fromkeys(".".join(parts[:count]) for parts in names for count in range(1, len(parts) + 1))
    near = difflib.get_close_matches(glob, every, 3)
    if near:
        return f"the closest are {near}"
    return f"there are {list(dict.fromkeys(parts[0] for parts in names))[:8]}"
