"""The folders of slim.py's stages, and whether what an earlier command has left in them fits the plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from timm_autoslim import Budget, Stage
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.networks import is_searched, read_networks
from timm_autoslim.recipes.lib.run_folder import hash_file, read_args

_MAY_FOLLOW = (
    "give the --budgets of before (tighter ones may follow, or ones in other metrics), or another --experiment."
)


def choose_start(
    args: argparse.Namespace, run: Path, stage: Stage, source: Path | None, first: bool
) -> tuple[argparse.Namespace, Path]:
    """Return the flags and the folder of one stage.

    Args:
        args: the flags of the run.
        run: its folder.
        stage: the stage.
        source: the exported network that it starts from; None for the original.
        first: whether it lies in the run's own folder, see `find_first`.
    """
    teacher = str(run) if args.teacher in (None, "original") else args.teacher
    values = vars(args) | {"teacher": teacher, "network": None, "from_scratch": False, "start_sha256": None}
    values |= {} if stage.asked else {"epochs": 0}
    folder = name_folder(run, stage.budget, first)
    if source:
        values |= {"model": f"local-dir:{source}", "pretrained": True, "initial_checkpoint": None,
                   "model_kwargs": {}, "start_sha256": hash_file(source / "model.safetensors")}  # fmt: skip
    return argparse.Namespace(**values | {"run": str(folder)}), folder


def name_folder(run: Path, budget: Budget, first: bool) -> Path:
    """Return the folder of the stage of a budget."""
    return run if first else run / f"to-{budget.slug}"


def find_first(run: Path, plan: Sequence[Stage]) -> Budget:
    """Return the budget whose stage lies in the run's own folder: of the network that is there, or else the first."""
    texts = [network.text for network in read_networks(run).values()] if is_searched(run) else []
    return next((stage.budget for stage in plan if stage.budget.text in texts), plan[0].budget)


def check_plan(run: Path, plan: Sequence[Stage]) -> None:
    """Make sure that what an earlier command has begun is of this plan, and of no network that is yet to come.

    Raises:
        ConfigError: a folder holds the network of another budget, or one that was cut from another start.
    """
    first = find_first(run, plan)
    folders = {stage.budget: name_folder(run, stage.budget, stage.budget == first) for stage in plan}
    begun = {budget: is_searched(folder) for budget, folder in folders.items()}
    for budget, folder in folders.items():
        texts = [network.text for network in read_networks(folder).values()] if begun[budget] else []
        if texts and budget.text not in texts:
            raise ConfigError(f"{folder} holds the network of {texts[0]}, and none of {budget.text}: {_MAY_FOLLOW}")
    for stage in plan:
        if stage.start and begun[stage.budget] and not begun[stage.start]:
            folder = name_folder(run, stage.budget, first=False)
            raise ConfigError(
                f"{folder} holds the network of {stage.budget.text}, cut before there was one of "
                f"{stage.start.text}: {_MAY_FOLLOW}"
            )


def check_start(args: argparse.Namespace, folder: Path, budget: Budget) -> None:
    """Make sure that a folder which an earlier command has left is of this budget, cut from the same model.

    Raises:
        ConfigError: it is not.
    """
    begun = [network.text for network in read_networks(folder).values()] if is_searched(folder) else []
    before = read_args(folder, argparse.Namespace(data_dir=None)) if (folder / "args.yaml").is_file() else None
    other_start = before is not None and getattr(before, "start_sha256", None) != args.start_sha256
    if begun[:1] not in ([], [budget.text]) or other_start:
        start = before.model.rpartition("/")[2] if before else "the original"
        raise ConfigError(
            f"{folder} holds the network of {''.join(begun[:1]) or budget.text}, cut from {start}: {_MAY_FOLLOW}"
        )
