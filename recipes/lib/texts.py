"""Words for numbers."""

from __future__ import annotations


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
