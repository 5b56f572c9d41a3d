"""Slim any timm or torchvision model: one slimmable supernet, a greedy channel search, an ordinary smaller model.

Importing the package registers slimmed models with timm. All else is imported when it is first asked for, so that
loading a slimmed model waits for neither tracing nor search.
"""

import importlib
from typing import TYPE_CHECKING, Any

from timm_autoslim.errors import AutoSlimError as AutoSlimError
from timm_autoslim.utils.interrupts import shorten_interrupts

shorten_interrupts()  # of all imports that follow, which take seconds

from timm_autoslim.artifact import load as _load  # noqa: E402, F401  (registers slim models with timm)

if TYPE_CHECKING:
    from timm_autoslim.artifact.bases import create_base as create_base
    from timm_autoslim.artifact.bases import create_meta_base as create_meta_base
    from timm_autoslim.artifact.export import export as export
    from timm_autoslim.artifact.folder import check_folder as check_folder
    from timm_autoslim.artifact.hub import push as push
    from timm_autoslim.artifact.save import load as load
    from timm_autoslim.artifact.save import save as save
    from timm_autoslim.costs.conditions import Conditions as Conditions
    from timm_autoslim.costs.cost import Cost as Cost
    from timm_autoslim.costs.cost import cost as cost
    from timm_autoslim.costs.cost import cost_by_module as cost_by_module
    from timm_autoslim.costs.fit import LatencyReport as LatencyReport
    from timm_autoslim.costs.inspection import Fixed as Fixed
    from timm_autoslim.costs.inspection import Inspection as Inspection
    from timm_autoslim.costs.inspection import inspect as inspect
    from timm_autoslim.costs.latency import LatencyTable as LatencyTable
    from timm_autoslim.costs.measure import measure_in_turns as measure_in_turns
    from timm_autoslim.costs.measure import measure_latency as measure_latency
    from timm_autoslim.costs.measure import measure_turns as measure_turns
    from timm_autoslim.costs.metrics import METRICS as METRICS
    from timm_autoslim.costs.reach import Reach as Reach
    from timm_autoslim.costs.reach import reach as reach
    from timm_autoslim.costs.runtimes import RUNTIMES as RUNTIMES
    from timm_autoslim.slimming.accuracy import Accuracy as Accuracy
    from timm_autoslim.slimming.baselines import BASELINES as BASELINES
    from timm_autoslim.slimming.baselines import baseline as baseline
    from timm_autoslim.slimming.budgets import Budget as Budget
    from timm_autoslim.slimming.candidates import RANKINGS as RANKINGS
    from timm_autoslim.slimming.descent import MODES as MODES
    from timm_autoslim.slimming.goals import parse_budgets as parse_budgets
    from timm_autoslim.slimming.goals import uniform_at as uniform_at
    from timm_autoslim.slimming.held_out import HeldOut as HeldOut
    from timm_autoslim.slimming.luck import describe_luck as describe_luck
    from timm_autoslim.slimming.luck import estimate_subnets as estimate_subnets
    from timm_autoslim.slimming.network import Found as Found
    from timm_autoslim.slimming.network import Step as Step
    from timm_autoslim.slimming.refinement import REFINEMENTS as REFINEMENTS
    from timm_autoslim.slimming.result import SearchResult as SearchResult
    from timm_autoslim.slimming.scoring import check_scores as check_scores
    from timm_autoslim.slimming.search import search as search
    from timm_autoslim.slimming.slim import slim as slim
    from timm_autoslim.slimming.stages import Stage as Stage
    from timm_autoslim.slimming.stages import plan_stages as plan_stages
    from timm_autoslim.slimming.team import SharedLatency as SharedLatency
    from timm_autoslim.slimming.team import Team as Team
    from timm_autoslim.supernet.convert import convert as convert
    from timm_autoslim.supernet.order import CRITERIA as CRITERIA
    from timm_autoslim.supernet.order import permute_units as permute_units
    from timm_autoslim.supernet.order import reorder_channels as reorder_channels
    from timm_autoslim.supernet.space import SearchSpace as SearchSpace
    from timm_autoslim.supernet.supernet import Supernet as Supernet
    from timm_autoslim.supernet.widths import ChannelGroup as ChannelGroup
    from timm_autoslim.supernet.widths import Widths as Widths
    from timm_autoslim.training.calibration import batch_statistics as batch_statistics
    from timm_autoslim.training.calibration import calibrate as calibrate
    from timm_autoslim.training.distillation import DISTILLATION_LOSSES as DISTILLATION_LOSSES
    from timm_autoslim.training.distillation import adaptive_alpha_divergence as adaptive_alpha_divergence
    from timm_autoslim.training.distillation import soft_cross_entropy as soft_cross_entropy
    from timm_autoslim.training.reconstruction import LayerReconstruction as LayerReconstruction
    from timm_autoslim.training.reconstruction import Reconstruction as Reconstruction
    from timm_autoslim.training.reconstruction import reconstruct as reconstruct
    from timm_autoslim.training.residual import zero_last_norms as zero_last_norms
    from timm_autoslim.training.samplers import SAMPLERS as SAMPLERS
    from timm_autoslim.training.sandwich import SandwichStep as SandwichStep
    from timm_autoslim.training.sandwich import sandwich_step as sandwich_step
    from timm_autoslim.utils.amounts import write_amount as write_amount

__version__ = "0.1.0"

# The module that defines each public name.
_MODULES = {
    "Accuracy": "slimming.accuracy",
    "BASELINES": "slimming.baselines",
    "Budget": "slimming.budgets",
    "CRITERIA": "supernet.order",
    "ChannelGroup": "supernet.widths",
    "Conditions": "costs.conditions",
    "Cost": "costs.cost",
    "DISTILLATION_LOSSES": "training.distillation",
    "Fixed": "costs.inspection",
    "Found": "slimming.network",
    "HeldOut": "slimming.held_out",
    "Inspection": "costs.inspection",
    "LayerReconstruction": "training.reconstruction",
    "LatencyReport": "costs.fit",
    "LatencyTable": "costs.latency",
    "METRICS": "costs.metrics",
    "MODES": "slimming.descent",
    "RANKINGS": "slimming.candidates",
    "REFINEMENTS": "slimming.refinement",
    "RUNTIMES": "costs.runtimes",
    "Reach": "costs.reach",
    "Reconstruction": "training.reconstruction",
    "SAMPLERS": "training.samplers",
    "SandwichStep": "training.sandwich",
    "SearchResult": "slimming.result",
    "SearchSpace": "supernet.space",
    "SharedLatency": "slimming.team",
    "Stage": "slimming.stages",
    "Step": "slimming.network",
    "Supernet": "supernet.supernet",
    "Team": "slimming.team",
    "Widths": "supernet.widths",
    "adaptive_alpha_divergence": "training.distillation",
    "baseline": "slimming.baselines",
    "batch_statistics": "training.calibration",
    "calibrate": "training.calibration",
    "check_folder": "artifact.folder",
    "check_scores": "slimming.scoring",
    "convert": "supernet.convert",
    "cost": "costs.cost",
    "cost_by_module": "costs.cost",
    "create_base": "artifact.bases",
    "create_meta_base": "artifact.bases",
    "describe_luck": "slimming.luck",
    "estimate_subnets": "slimming.luck",
    "export": "artifact.export",
    "load": "artifact.save",
    "inspect": "costs.inspection",
    "measure_in_turns": "costs.measure",
    "measure_latency": "costs.measure",
    "measure_turns": "costs.measure",
    "parse_budgets": "slimming.goals",
    "permute_units": "supernet.order",
    "plan_stages": "slimming.stages",
    "push": "artifact.hub",
    "reach": "costs.reach",
    "reconstruct": "training.reconstruction",
    "reorder_channels": "supernet.order",
    "sandwich_step": "training.sandwich",
    "save": "artifact.save",
    "search": "slimming.search",
    "slim": "slimming.slim",
    "soft_cross_entropy": "training.distillation",
    "uniform_at": "slimming.goals",
    "zero_last_norms": "training.residual",
    "write_amount": "utils.amounts",
}
__all__ = ["AutoSlimError", *_MODULES]
_PUBLIC_MODULES = ("errors", "files", "plot")


def __getattr__(name: str) -> Any:
    """Import a public name, or a public module, when it is first asked for."""
    if name in _PUBLIC_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
