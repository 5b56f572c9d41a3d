"""Slim any timm or torchvision model: one slimmable supernet, a greedy channel search, an ordinary smaller model.

Importing the package registers slimmed models with timm. What makes them is imported when it is first asked for, so who
only loads a model waits for neither tracing nor search.
"""

import importlib
from typing import TYPE_CHECKING, Any

from timm_autoslim import registry as registry  # timm knows slimmed models from here on
from timm_autoslim.errors import AutoSlimError

if TYPE_CHECKING:
    from timm_autoslim.artifact import export
    from timm_autoslim.baselines import baseline
    from timm_autoslim.calibration import batch_statistics, calibrate
    from timm_autoslim.costs import Conditions, Cost, cost, uniform_at
    from timm_autoslim.folder import check_folder
    from timm_autoslim.hub import push
    from timm_autoslim.latency import LatencyReport, LatencyTable
    from timm_autoslim.sandwich import SandwichStep, sandwich_step
    from timm_autoslim.scoring import HeldOut, SharedLatency, Team
    from timm_autoslim.slimming import Found, SearchResult, Step, search
    from timm_autoslim.space import ChannelGroup, SearchSpace, Widths
    from timm_autoslim.stopwatch import measure_latency
    from timm_autoslim.supernet import Supernet, convert

__version__ = "0.1.0"

__all__ = [
    "AutoSlimError",
    "ChannelGroup",
    "Conditions",
    "Cost",
    "Found",
    "HeldOut",
    "LatencyReport",
    "LatencyTable",
    "SandwichStep",
    "SearchResult",
    "SearchSpace",
    "SharedLatency",
    "Step",
    "Supernet",
    "Team",
    "Widths",
    "baseline",
    "batch_statistics",
    "calibrate",
    "check_folder",
    "convert",
    "cost",
    "export",
    "measure_latency",
    "push",
    "sandwich_step",
    "search",
    "uniform_at",
]

# the room that each of these names is in
_ROOMS = {
    "ChannelGroup": "space",
    "Conditions": "costs",
    "Cost": "costs",
    "Found": "slimming",
    "HeldOut": "scoring",
    "LatencyReport": "latency",
    "LatencyTable": "latency",
    "SandwichStep": "sandwich",
    "SearchResult": "slimming",
    "SearchSpace": "space",
    "SharedLatency": "scoring",
    "Step": "slimming",
    "Supernet": "supernet",
    "Team": "scoring",
    "Widths": "space",
    "baseline": "baselines",
    "batch_statistics": "calibration",
    "calibrate": "calibration",
    "check_folder": "folder",
    "convert": "supernet",
    "cost": "costs",
    "export": "artifact",
    "measure_latency": "stopwatch",
    "push": "hub",
    "sandwich_step": "sandwich",
    "search": "slimming",
    "uniform_at": "costs",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
