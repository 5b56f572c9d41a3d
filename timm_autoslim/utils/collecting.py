"""Python's garbage collection, where it costs more than what it collects."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

from timm_autoslim.utils.restoring import restoring

# Collection is switched on and off for the process, and blocks of several threads overlap: the first one switches it
# off, and the last one on again.
_lock = threading.RLock()
_blocks: dict[object, bool] = {}  # those that are open, and whether the first one found it on


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
    block = object()

    def begin() -> None:
        with _lock:
            _blocks[block] = next(iter(_blocks.values())) if _blocks else gc.isenabled()
            gc.disable()

    def end() -> None:
        with _lock:
            if _blocks.get(block) and len(_blocks) == 1:
                gc.enable()
            _blocks.pop(block, None)

    with restoring(end):
        begin()
        yield
