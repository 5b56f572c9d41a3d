"""Blocks of code in which a supernet is one subnet: `with supernet.at(widths):`."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Generic, TypeVar

from timm_autoslim.supernet.widths import Widths

S = TypeVar("S")  # the supernet


class OpenBlocks(threading.local):
    """The `at` blocks that a thread has open, the innermost last."""

    def __init__(self) -> None:
        # weak: a block that an interrupt kept from closing is gone with the frame that opened it
        self.blocks: list[weakref.ref[Block[Any]]] = []

    @property
    def widths(self) -> Widths | None:
        """The widths of the innermost block; None if there is none."""
        while self.blocks:
            block = self.blocks[-1]()
            if block is not None:
                return block.widths
            self.blocks.pop()
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenBlocks:
        return OpenBlocks()

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenBlocks, ()


class Block(Generic[S]):
    """A `with supernet.at(widths):` block.

    Attributes:
        widths: those of the subnet that `supernet(images)` is inside the block.
    """

    def __init__(self, supernet: S, blocks: OpenBlocks, widths: Widths) -> None:
        self.widths = widths
        self._supernet, self._blocks = supernet, blocks

    def __enter__(self) -> S:
        try:
            self._blocks.blocks.append(weakref.ref(self))
            return self._supernet
        except BaseException:  # an interrupt
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._blocks.blocks[:] = [block for block in self._blocks.blocks if block() not in (self, None)]
