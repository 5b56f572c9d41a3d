"""Words for numbers, and flags as a command line has them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping


def write_count(count: int, one: str, many: str = "") -> str:
    """Return a number of things in words.

    Args:
        count: how many.
        one: the word for one.
        many: the word for several; that for one with an s if not given.

    Example:
        >>> write_count(1, "thread"), write_count(2, "thread"), write_count(2, "process", "processes")
        ('1 thread', '2 threads', '2 processes')
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def write_flag(name: str, value: object) -> str:
    """Return a flag as it is given on a command line.

    Example:
        >>> write_flag("mean", [0.5, 1.0]), write_flag("amp", False), write_flag("model_kwargs", {"drop_rate": 0.1})
        ('--mean 0.5 1', '--no-amp', '--model-kwargs drop_rate=0.1')
        >>> write_flag("data_dir", "images v1.0")
        "--data-dir 'images v1.0'"
    """
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool) or value is None:
        return flag if value else f"--no-{flag[2:]}"
    if isinstance(value, Mapping):
        value = [f"{key}={item}" for key, item in value.items()]
    values = value if isinstance(value, list | tuple) else [value]
    texts = (str(item).removesuffix(".0") if isinstance(item, float) else str(item) for item in values)
    return " ".join([flag, *map(shlex.quote, texts)])
