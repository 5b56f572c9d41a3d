"""Python's garbage collection, where it costs more than what it collects."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from timm_autoslim.utils.restoring import restoring


@contextlib.contextmanager
def pause_collection() -> Iterator[None]:
    """Let the collection of reference cycles wait for the end of a block that makes many objects.

    Else it would look through all objects of the process in the middle of the block, which can take as long as the
    block itself.

    Example:
        >>> import gc
        >>> with pause_collection():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    with restoring(gc.enable if gc.isenabled() else gc.disable):
        gc.disable()
        yield
