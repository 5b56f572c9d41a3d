"""The settings of a run of several stages: kept once its work has begun, for a finished stage is of these settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from timm_autoslim import files
from timm_autoslim.errors import ConfigError


def keep_settings(path: Path, settings: Mapping[str, Any], begun: bool) -> bool:
    """Write the settings of a run to its folder; return whether they are those of before.

    Args:
        path: of the YAML file.
        settings: to be written.
        begun: whether work was done that other settings would not fit.

    Raises:
        ConfigError: the file has other settings, and the work has begun.
    """
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    changes = []
    if before is not None:
        names = sorted(before.keys() | settings.keys())
        changes = [name for name in names if before.get(name) != settings.get(name)]
        if changes and begun:
            raise ConfigError(
                f"{path.parent} was begun with other settings ({', '.join(changes)}): give the same ones to go on, "
                "or another --experiment."
            )
    files.write_text(path, yaml.safe_dump(dict(settings), sort_keys=False))
    return before is not None and not changes
