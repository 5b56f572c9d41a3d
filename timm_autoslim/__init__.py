"""Slim any timm or torchvision model: one slimmable supernet, a greedy channel search, an ordinary smaller model."""

from timm_autoslim.artifact import export
from timm_autoslim.baselines import baseline
from timm_autoslim.calibration import batch_statistics, calibrate
from timm_autoslim.costs import Conditions, Cost, cost, uniform_at
from timm_autoslim.errors import AutoSlimError
from timm_autoslim.folder import check_folder
from timm_autoslim.hub import push
from timm_autoslim.latency import LatencyReport, LatencyTable
from timm_autoslim.sandwich import SandwichStep, sandwich_step
from timm_autoslim.scoring import HeldOut, Team
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
