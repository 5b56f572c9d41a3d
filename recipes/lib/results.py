"""Results of fine-tuned networks: RUN/exported/NETWORK/result.json, in the folder of the network; `Accuracy` reads it.

One file for each network, so fine-tunings that end at the same time do not meet. It lies in the exported folder, so it
goes where the network goes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm_autoslim import Found
from timm_autoslim.recipes.lib.run_folder import write_json

RESULT = "result.json"


def write_result(exported: Path, network: Found, measures: dict[str, Any]) -> None:
    """Write what a network of an exported folder is and is worth."""
    row = {"method": network.method, "budget": network.text, "macs": network.cost.macs, "params": network.cost.params}
    write_json(exported / RESULT, row | measures | {"widths": network.widths.to_dict()})
