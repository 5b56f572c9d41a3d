"""The flags of the recipes that find and finish networks: budgets, the search, the teacher, the reconstruction."""

from __future__ import annotations

import argparse

from timm_autoslim import BASELINES, CRITERIA, METRICS, MODES, RANKINGS, REFINEMENTS, RUNTIMES
from timm_autoslim.recipes.lib.parser import ON_OFF, share
from timm_autoslim.recipes.lib.training_flags import add_teacher


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of search.py alone."""
    parser.add_argument("run", help="a run folder of train.py")
    add_budget_flags(parser)
    group = parser.add_argument_group("baselines")
    group.add_argument(
        "--baselines",
        nargs="*",
        choices=list(BASELINES),
        default=["uniform"],
        help="simpler methods to compare the search with; scored on the same images",
    )
    group.add_argument(
        "--candidates", type=int, default=100, help="subnets that random and evolutionary draw for each budget"
    )
    group.add_argument(
        "--criterion",
        choices=[name for name in CRITERIA if name not in ("random", "reconstruction")],
        default="l2",
        help="criterion of torch-pruning by which the baselines importance and isomorphic rank the channels; taylor "
        "reads the gradients of the run's --order-images training images",
    )


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every recipe that searches: the budgets, and how their networks are searched."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--budgets",
        nargs="+",
        default=["macs=50%"],
        metavar="METRIC=AMOUNT",
        help="such as macs=50%% (of the widest), macs=300M or params=2.5M; several limits for one network are quoted: "
        f"'macs<=300M and params<=2M'; metrics: {', '.join(METRICS)}",
    )
    group.add_argument(
        "--cost-batch-size", type=int, default=1, help="images in a batch, for peak_bytes and latency_ms"
    )
    group.add_argument("--latency-table", help="file of measured operators; default: latency.json of the run folder")
    group.add_argument("--latency-device", default="cpu", help="device of latency_ms, such as cpu or cuda:0")
    group.add_argument(
        "--latency-runtime",
        "--latency",
        choices=list(RUNTIMES),
        default="eager",
        help="how the network will run on that device",
    )
    group.add_argument("--latency-threads", type=int, default=1, help="CPU threads")
    group.add_argument(
        "--mode",
        choices=list(MODES),
        default="fast",
        help="fast: few candidates are scored, on some of the images; reference: all on all, as published",
    )
    group.add_argument(
        "--rank",
        choices=list(RANKINGS),
        default="per_cost",
        help="keep the candidate with the lowest loss, or with the least rise of the loss for what it saves",
    )
    group.add_argument(
        "--steps", type=int, help="steps from a group's full width to its narrowest; 5 in the fast mode, else 10"
    )
    group.add_argument(
        "--refine",
        choices=list(REFINEMENTS),
        default="units",
        help="use what the descent leaves of a budget, to within 1 %%: with any width (units), with the widths of the "
        "search space alone (choices), or not at all (none)",
    )
    group.add_argument(
        "--images", type=int, default=0, help="held-out images that score a candidate; 0, or more than there are: all"
    )


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the recipes that fine-tune: what the network learns from besides the labels."""
    group = parser.add_argument_group("distillation", "what the network learns from besides the labels")
    group.add_argument(
        "--teach",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="share of the teacher's loss; the labels have the rest",
    )
    group.add_argument(
        "--unlabelled",
        metavar="DIR",
        help="folder of further images to train on, at any depth and without labels: the teacher's loss alone counts",
    )
    add_teacher(
        group,
        "the teacher: original (what the run's training started from; the default where it had trained weights of "
        "these classes), a pretrained timm model, torchvision/NAME, a folder, a run folder (its widest), a file of "
        "weights of --model, or none",
    )


def add_finetune_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of finetune.py alone."""
    parser.add_argument("run", help="a run folder that was searched")
    group = parser.add_argument_group("network")
    group.add_argument("--network", help="name of a network of the search")
    group.add_argument("--from-scratch", action=ON_OFF, default=False, help="fresh weights, not the supernet's")
    add_reconstruction_flag(group, default=0)


def add_reconstruction_flag(group: argparse._ArgumentGroup, default: int) -> None:
    """Flag of the recipes that reconstruct a network before they fine-tune it."""
    group.add_argument(
        "--reconstruct",
        type=int,
        default=default,
        metavar="IMAGES",
        help="training images to reconstruct the network with before it is trained: its layers get the weights that "
        "reproduce those of the widest; 0: not",
    )


def add_slim_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of slim.py alone."""
    group = parser.add_argument_group("slim")
    group.add_argument(
        "--score-by",
        choices=["outputs", "labels"],
        default="outputs",
        help="what the search compares a candidate with, by cross-entropy: the outputs of the original, or the labels",
    )
    add_reconstruction_flag(group, default=5000)
    group.add_argument(
        "--onnx", action=ON_OFF, default=False, help="also write RUN/onnx/NETWORK.onnx, checked in ONNX Runtime"
    )
    group.add_argument("--output", default="runs", help="folder of runs")
    group.add_argument("--experiment", help="name of the run's folder; the model's name if not given")
