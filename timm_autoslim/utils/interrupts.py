"""Ctrl-C in a command of the shell: one line, from the first import on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

_COMMANDS = ("-m", "autoslim", "autoslim.exe")  # `python -m` is so called while it imports the package


def shorten_interrupts() -> None:
    """Show an interruption as one line, without a traceback, where this process is a command of the package."""
    if not sys.argv or Path(sys.argv[0]).name not in _COMMANDS:
        return
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\nInterrupted.", file=sys.stderr, flush=True)
        else:
            before(kind, error, trace)

    sys.excepthook = show
