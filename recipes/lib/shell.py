"""Recipes as commands of the shell."""

from __future__ import annotations

import sys
from collections.abc import Callable

from timm_autoslim.errors import AutoSlimError


def run_command(main: Callable[[], None]) -> None:
    """Run a recipe from the shell: what the user can mend is a message, not a traceback."""
    try:
        main()
    except AutoSlimError as error:
        sys.exit(f"{type(error).__name__}: {error}")
