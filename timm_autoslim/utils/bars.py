"""Progress bars, for everything that takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def show_bar(items: Iterable[Any] | None = None, *, shown: bool = True, **settings: Any) -> Any:
    """Return a bar of tqdm's, which is gone when it is closed.

    It is shown in a terminal and in a notebook. In a pipe or a file it is not: there nothing can be taken back, and
    every move would stay among the lines of the output.

    Args:
        items: what to iterate over, if anything.
        shown: False hides it everywhere.
        **settings: tqdm's, such as `total` and `desc`.

    Example:
        >>> [item for item in show_bar([1, 2], shown=False)]
        [1, 2]
    """
    return tqdm(items, disable=None if shown else True, leave=False, dynamic_ncols=True, **settings)
