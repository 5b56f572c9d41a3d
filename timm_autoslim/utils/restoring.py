"""Changes that are taken back at the end of a block, wherever an interrupt comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def restoring(restore: Callable[[], object]) -> Iterator[None]:
    """Call `restore` at the end of a block; where an interrupt ends it half-way, call it again.

    It may be called before all changes were made, and twice. So it sets what was there before, and asks for nothing.

    Example:
        >>> values = [1]
        >>> def restore():
        ...     values[0] = 1
        >>> with restoring(restore):
        ...     values[0] = 2
        >>> values
        [1]
    """
    restored = False
    try:
        try:
            yield
        finally:
            restore()
            restored = True
    except BaseException:
        if not restored:
            restore()
        raise


@contextlib.contextmanager
def restoring_on_error(restore: Callable[[], object]) -> Iterator[None]:
    """Call `restore` if the block ends by an error or an interrupt.

    Example:
        >>> values = [1]
        >>> with contextlib.suppress(KeyError), restoring_on_error(values.clear):
        ...     values.append({}["no such key"])
        >>> values
        []
    """
    try:
        yield
    except BaseException:
        restore()
        raise
