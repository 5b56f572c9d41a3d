"""The flags of the recipes, in groups; names and defaults are those of timm's train.py where it has them."""

from __future__ import annotations

import argparse
from typing import Any

from timm_autoslim import (
    BASELINES,
    CRITERIA,
    DISTILLATION_LOSSES,
    METRICS,
    MODES,
    RANKINGS,
    REFINEMENTS,
    RUNTIMES,
    SAMPLERS,
)
from timm_autoslim.recipes.lib.parser import KeyValues

CROPS = ("center", "squash", "border")
ON_OFF = argparse.BooleanOptionalAction


def add_general_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every recipe."""
    group = parser.add_argument_group("general")
    group.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="flat YAML file with values for these flags, or a name of those that come with the recipes: digits",
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with train and val|validation|test: each a folder of class folders, or one .tar file of them; a "
        "fifth of the images is for tests where there are none",
    )
    group.add_argument("-b", "--batch-size", type=int, default=128, help="images per process and step")
    group.add_argument("-j", "--workers", type=int, default=0, help="processes that load images; 0: none besides")
    group.add_argument("--seed", type=int, default=42)
    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", choices=("cpu", "cuda"), help="as Accelerate chooses if not given")
    group.add_argument("--threads", type=int, default=0, help="CPU threads per process; 0: leave torch's choice")
    group.add_argument("--amp", action=ON_OFF, default=False, help="mixed precision")
    group.add_argument("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16")
    group.add_argument(
        "--deterministic",
        action=ON_OFF,
        default=False,
        help="slower algorithms that give the same bits every time: a resumed training on a GPU then equals the "
        "uninterrupted one",
    )
    group.add_argument("--channels-last", action=ON_OFF, default=False, help="NHWC memory layout")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags about the model and the images: given to train.py, which writes them to args.yaml of the run folder."""
    parser.add_argument("data", nargs="?", metavar="DATA", help="folder of images: the same as --data-dir")
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        default="resnet18",
        metavar="NAME",
        help="a timm model, torchvision/NAME, a folder, or a repository of the Hub (hf-hub:OWNER/NAME)",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="such as drop_rate=0.2 drop_path_rate=0.1",
    )
    group.add_argument("--pretrained", action=ON_OFF, default=False, help="start from pretrained weights")
    group.add_argument("--num-classes", type=int, help="those of the data if not given")
    group.add_argument("--in-chans", type=int, help="channels of the images, 1 or 3; as the model has it if not given")
    group.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="--in-chans and --img-size")
    group.add_argument("--img-size", type=int, help="side of the square images; as the model has it if not given")
    group.add_argument("--mean", type=float, nargs="+", help="per channel; as the model has it if not given")
    group.add_argument("--std", type=float, nargs="+", help="per channel; as the model has it if not given")
    group.add_argument("--interpolation", help="how images are resized; as the model has it if not given")
    group.add_argument("--crop-pct", type=float, help="share that a test crops; as the model has it if not given")
    group.add_argument("--crop-mode", choices=CROPS, help="how a test crops; as the model has it if not given")
    group.add_argument("--drop", type=float, help="the model argument drop_rate")
    group.add_argument("--drop-path", type=float, help="the model argument drop_path_rate")
    group.add_argument("--freeze", nargs="*", default=[], metavar="GLOB", help="modules that keep all their channels")
    group.add_argument("--min-width", type=float, help="narrowest share of every group's channels")
    group.add_argument("--divisor", type=int, help="widths are multiples of this")
    group.add_argument(
        "--choices",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="GLOB=[...]",
        help="widths of the groups that a glob matches, such as layer1*=[8,16,32]; wins over the two above",
    )
    group.add_argument(
        "--dataset",
        help="'digits' (scikit-learn's, the default without --data-dir) or a name that timm's create_dataset knows: "
        "torch/cifar10, hfds/OWNER/NAME",
    )
    group.add_argument("--train-split", metavar="NAME", help="of the training images, if it is not train")
    group.add_argument("--val-split", metavar="NAME", help="of the test images, if it is not val, validation or test")
    group.add_argument(
        "--limit-train", type=float, default=1.0, help="share, or number, of the training images; more: all of them"
    )
    group.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        help="share, or number, of the training images that are held out for the search",
    )


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """Flags about the optimizer and its learning rate, of the recipes that train."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="sgd", help="a timm optimizer")
    group.add_argument("--opt-eps", type=float, help="as the optimizer has it if not given")
    group.add_argument("--opt-betas", type=float, nargs="+", help="as the optimizer has it if not given")
    group.add_argument("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=2e-5)
    group.add_argument("--layer-decay", type=float, help="factor of the learning rate from one layer to that before it")
    group.add_argument(
        "--clip-grad", type=float, help="limit of the gradients, which are clipped once an update; 0: none"
    )
    group.add_argument("--clip-mode", choices=("norm", "value", "agc"), default="norm")
    group.add_argument(
        "--grad-accum-steps", type=int, default=1, help="batches in one update; all of them train the same subnets"
    )
    group = parser.add_argument_group("learning rate schedule")
    group.add_argument("--epochs", type=int, default=300)
    group.add_argument("--lr", type=float, help="learning rate; overrides --lr-base")
    group.add_argument("--lr-base", type=float, default=0.1, help="learning rate at --lr-base-size images an update")
    group.add_argument("--lr-base-size", type=int, default=256)
    group.add_argument(
        "--lr-base-scale",
        choices=("linear", "sqrt"),
        help="how --lr-base grows with the images of an update; by default sqrt for adaptive optimizers, else linear",
    )
    group.add_argument("--sched", default="cosine", help="a timm scheduler")
    group.add_argument("--warmup-epochs", type=float, default=0)
    group.add_argument("--warmup-lr", type=float, default=1e-5)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--decay-epochs", type=float, default=90, help="interval of the step schedule")
    group.add_argument("--decay-rate", type=float, default=0.1, help="factor of step, exponent of poly")


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags about augmentation and regularization, of the recipes that train."""
    group = parser.add_argument_group("augmentation and regularization")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect of the random crop")
    group.add_argument("--train-interpolation", help="how training images are resized, or random; as --interpolation")
    group.add_argument("--hflip", type=float, default=0.5)
    group.add_argument("--vflip", type=float, default=0.0)
    group.add_argument("--color-jitter", type=float, default=0.4)
    group.add_argument("--aa", help="timm's AutoAugment policy, such as rand-m9-mstd0.5")
    group.add_argument("--reprob", type=float, default=0.0, help="probability of random erasing")
    group.add_argument("--remode", default="pixel", help="mode of random erasing")
    group.add_argument("--recount", type=int, default=1, help="count of random erasing")
    group.add_argument("--mixup", type=float, default=0.0)
    group.add_argument("--cutmix", type=float, default=0.0)
    group.add_argument("--mixup-prob", type=float, default=1.0, help="probability of mixup or cutmix")
    group.add_argument("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix if both are on")
    group.add_argument("--mixup-off-epoch", type=int, default=0, help="turn them off after this epoch; 0: never")
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """All other flags of the recipes that train: statistics, moving average, checkpoints, curves."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--grad-checkpointing", action=ON_OFF, default=False, help="compute activations again in the backward pass"
    )
    group = parser.add_argument_group("batch norm")
    group.add_argument("--sync-bn", action=ON_OFF, default=False, help="statistics over the batches of all processes")
    group.add_argument("--calibration-images", type=int, default=2048, help="training images that calibrate BatchNorm")
    group = parser.add_argument_group("model exponential moving average")
    group.add_argument(
        "--model-ema", action=ON_OFF, default=False, help="keep a moving average of the weights, which is the result"
    )
    group.add_argument("--model-ema-decay", type=float, default=0.9998)
    group = parser.add_argument_group("checkpoints and tracking")
    group.add_argument("--resume", action=ON_OFF, default=False, help="go on from the last checkpoint")
    group.add_argument(
        "--recovery-interval",
        type=int,
        default=0,
        help="updates between checkpoints within an epoch; 0: only after each epoch",
    )
    group.add_argument("--checkpoint-hist", type=int, default=2, help="how many checkpoints stay")
    group.add_argument("--val-interval", type=int, default=1, help="epochs between validations")
    group.add_argument(
        "--log-interval",
        type=int,
        default=20,
        help="updates between checks of the loss, which are also the points of the curves",
    )
    group.add_argument("--log-tensorboard", action=ON_OFF, default=False, help="curves in RUN/tensorboard")
    group.add_argument("--log-wandb", action=ON_OFF, default=False, help="curves at Weights & Biases")
    group.add_argument("--wandb-project", default="timm-autoslim", help="project of --log-wandb")


def add_supernet_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of train.py alone: the sandwich rule, and where the run folder lies."""
    group = parser.add_argument_group("supernet")
    group.add_argument(
        "--sandwich", type=int, default=4, help="subnets of a step: the widest, the narrowest and random ones"
    )
    group.add_argument(
        "--sampler",
        choices=list(SAMPLERS),
        default="independent",
        help="random widths: drawn for each group (AutoSlim); the same, from eleven widths of each group, which is "
        "faster on GPUs; or one multiplier for all groups (US-Nets)",
    )
    group.add_argument(
        "--sandwich-delay",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of all steps that train the widest alone, before the others join (delayed shrinking)",
    )
    group.add_argument(
        "--regularize-widest-only",
        action=ON_OFF,
        default=False,
        help="all but the widest run without dropout and drop path (BigNAS)",
    )
    group.add_argument(
        "--subnet-sizes",
        type=int,
        nargs="*",
        default=[],
        metavar="PIXELS",
        help="every subnet but the widest sees its images at a random one of these sizes (MutualNet)",
    )
    group.add_argument(
        "--val-widths",
        type=float,
        nargs="*",
        default=[0.75, 0.5, 0.25],
        metavar="SHARE",
        help="uniform subnets that are validated besides the widest and the narrowest",
    )
    group.add_argument("--output", default="runs", help="folder of runs")
    group.add_argument("--experiment", help="name of the run's folder; the model's name if not given")


def _add_loss_of_distillation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--distill-loss",
        choices=list(DISTILLATION_LOSSES),
        default="kl",
        help="cross-entropy with soft labels, or the adaptive alpha-divergence (AlphaNet)",
    )
    group.add_argument(
        "--distill-temperature",
        "--kd-temperature",
        type=float,
        default=1.0,
        help="above 1 softens the outputs of teacher and subnet",
    )


def add_distillation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of train.py alone: what the subnets learn from."""
    group = parser.add_argument_group("distillation", "what all subnets but the widest learn from")
    _add_loss_of_distillation(group)
    group.add_argument(
        "--distill-teacher",
        choices=("widest", "ema"),
        default="widest",
        help="the widest subnet, or its moving average (DS-Net; needs --model-ema)",
    )
    group.add_argument(
        "--teacher",
        "--kd-model-name",
        metavar="NAME",
        help="another model as the teacher: a pretrained timm model, local-dir:FOLDER, or torchvision/NAME",
    )
    group.add_argument(
        "--teacher-kwargs", "--kd-model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE"
    )
    group.add_argument(
        "--teach-widest",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of --teacher's loss in the loss of the widest; the rest is the loss on the labels",
    )


def add_starting_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of train.py about where it starts; --pretrained is among those of the model."""
    group = parser.add_argument_group("starting point", "fresh weights if nothing is given")
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE",
        help="local .safetensors, .pth or .bin file of the model's weights; with other classes, all but the classifier",
    )
    group.add_argument(
        "--zero-init-last",
        action=ON_OFF,
        default=False,
        help="fresh weights with the scale of the last BatchNorm of every residual branch at 0 (BigNAS)",
    )
    group.add_argument(
        "--order",
        choices=sorted(CRITERIA),
        help="first sort the channels by importance, so that narrow subnets get the best (Once-for-All); a criterion "
        "of torch-pruning, or reconstruction: the best for trained models",
    )
    group.add_argument(
        "--order-images", type=int, default=512, help="training images that --order taylor and reconstruction read"
    )


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
        choices=[name for name in CRITERIA if name not in ("taylor", "random", "reconstruction")],
        default="l2",
        help="criterion of torch-pruning by which the baseline importance ranks the channels",
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
        "--teacher",
        "--kd-model-name",
        metavar="NAME",
        help="the teacher: original (what the run's training started from; the default where it had trained weights of "
        "these classes), a pretrained timm model, torchvision/NAME, a folder, a run folder (its widest), a file of "
        "weights of --model, or none",
    )
    group.add_argument(
        "--teacher-kwargs", "--kd-model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE"
    )
    group.add_argument(
        "--teach",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of the teacher's loss; the labels have the rest",
    )
    _add_loss_of_distillation(group)


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
    add_reconstruction_flag(group, default=2000)
    group.add_argument("--output", default="runs", help="folder of runs")
    group.add_argument("--experiment", help="name of the run's folder; the model's name if not given")


FLAGS = {
    "train": (
        add_general_flags, add_model_flags, add_starting_flags, add_optimizer_flags, add_augmentation_flags,
        add_training_flags, add_supernet_flags, add_distillation_flags,
    ),
    "search": (add_general_flags, add_search_flags),
    "finetune": (
        add_general_flags, add_optimizer_flags, add_augmentation_flags, add_training_flags, add_finetune_flags,
        add_teacher_flags,
    ),
    "slim": (
        add_general_flags, add_model_flags, add_starting_flags, add_budget_flags, add_optimizer_flags,
        add_augmentation_flags, add_training_flags, add_slim_flags, add_teacher_flags,
    ),
}  # fmt: skip

# Where a recipe's defaults differ from those of its flags: slim.py starts from a trained model, which forgets if it is
# trained as a fresh one.
DEFAULTS: dict[str, dict[str, Any]] = {
    "slim": {
        "batch_size": 64, "held_out": 0.2, "images": 1000, "order": "reconstruction", "opt": "adamw", "lr_base": 1e-3,
        "weight_decay": 0.05, "epochs": 10, "warmup_epochs": 1, "scale": [0.35, 1.0], "resume": True,
    },
}  # fmt: skip
