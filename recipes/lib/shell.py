"""Recipes as commands of the shell."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from timm_autoslim.errors import AutoSlimError

INTERRUPTED = 130  # the exit status of a command that SIGINT ends, as shells have it: 128 + 2
_PACKAGE = str(Path(__file__).resolve().parents[2])  # of timm_autoslim, or of the repository


def run_command(main: Callable[[], None], again: str = "the same command goes on from here") -> None:
    """Run a recipe from the shell: what the user can mend is a message, not a traceback, and so is Ctrl-C.

    Args:
        main: the recipe.
        again: what may be done after an interruption.
    """
    try:
        with _plain_warnings():
            main()
    except AutoSlimError as error:
        sys.exit(f"{type(error).__name__}: {_find_text(error)}")
    except KeyboardInterrupt:
        print(f"\nInterrupted: {again}.", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def _find_text(error: AutoSlimError) -> str:
    """Return the text of an error; of one that came from a worker of a loader, without the worker's traceback."""
    name = f"{type(error).__module__}.{type(error).__name__}: "
    text = str(error)
    return text.rpartition(name)[2].strip() if "Original Traceback" in text and name in text else text


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show what this package warns of in one line, for the length of a block; workers that are forked do so too."""
    before = warnings.showwarning

    def show(
        message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if category is UserWarning and str(Path(filename).resolve()).startswith(_PACKAGE):
            print(f"Warning: {message}", file=file or sys.stderr, flush=True)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
