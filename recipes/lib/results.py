"""Results of fine-tuned networks: RUN/exported/NETWORK/result.json, in the folder of the network that it tells about.

One file for each network, so fine-tunings that end at the same time do not meet. It lies in the exported folder, so it
goes where the network goes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.networks import Network
from timm_autoslim.recipes.lib.run_folder import write_json

RESULT = "result.json"
_NUMBERS = ("macs", "params", "top1")
_TEXTS = ("method", "budget")


def write_result(exported: Path, network: Network, measures: dict[str, Any]) -> None:
    """Write what a network of an exported folder is and is worth."""
    row = {"method": network.method, "budget": network.budget, "macs": network.cost.macs, "params": network.cost.params}
    write_json(exported / RESULT, row | measures | {"widths": network.widths.to_dict()})


def read_results(run: Path) -> dict[str, dict[str, Any]]:
    """Read the results of all networks of a run, by name.

    Raises:
        ConfigError: one is no result.
    """
    folders = sorted((run / "exported").glob("[!.]*"))
    results = {folder.name: read_result(folder) for folder in folders}
    return {name: row for name, row in results.items() if row}


def read_result(exported: Path) -> dict[str, Any] | None:
    """Read the result of one exported folder; None if it has none.

    Raises:
        ConfigError: it is no result.
    """
    path = exported / RESULT
    if not path.is_file():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        row = error
    fits = isinstance(row, dict) and isinstance(row.get("widths"), dict)
    fits = fits and all(type(row.get(key)) in (int, float) for key in _NUMBERS)
    if not fits or not all(isinstance(row.get(key), str) for key in _TEXTS):
        needed = f"an object with {', '.join((*_TEXTS, *_NUMBERS, 'widths'))}, as recipes/finetune.py writes it"
        remedy = "remove it, and fine-tune with --resume: the network is tested again"
        raise ConfigError.at(str(path), got="no result of a network", needed=needed, remedy=remedy)
    checked: dict[str, Any] = row
    return checked
