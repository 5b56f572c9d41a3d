"""Which flags each recipe has; their names are those of timm's train.py where it has them."""

from __future__ import annotations

import argparse
from typing import Any

from timm_autoslim import CRITERIA, SAMPLERS
from timm_autoslim.recipes.lib.network_flags import (
    add_budget_flags,
    add_finetune_flags,
    add_search_flags,
    add_slim_flags,
    add_teacher_flags,
)
from timm_autoslim.recipes.lib.parser import ON_OFF, KeyValues, share
from timm_autoslim.recipes.lib.training_flags import (
    add_augmentation_flags,
    add_optimizer_flags,
    add_teacher,
    add_training_flags,
)
from timm_autoslim.recipes.lib.width_flags import add_width_flags

CROPS = ("center", "squash", "border")


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
    group.add_argument("--crop-pct", type=share, help="share that a test crops; as the model has it if not given")
    group.add_argument("--crop-mode", choices=CROPS, help="how a test crops; as the model has it if not given")
    group.add_argument("--drop", type=float, help="the model argument drop_rate")
    group.add_argument("--drop-path", type=float, help="the model argument drop_path_rate")
    add_width_flags(group)
    group.add_argument(
        "--dataset",
        help="'digits' (scikit-learn's, the default without --data-dir) or a name that timm's create_dataset knows: "
        "torch/cifar10, hfds/OWNER/NAME",
    )
    group.add_argument("--train-split", metavar="NAME", help="of the training images, if it is not train")
    group.add_argument("--val-split", metavar="NAME", help="of the test images, if it is not val, validation or test")
    group.add_argument(
        "--limit-train", type=share, default=1.0, help="share, or number, of the training images; more: all of them"
    )
    group.add_argument(
        "--held-out",
        type=share,
        default=0.1,
        help="share, or number, of the training images that are held out for the search",
    )


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
        type=share,
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
        type=share,
        nargs="*",
        default=[0.75, 0.5, 0.25],
        metavar="SHARE",
        help="uniform subnets that are validated besides the widest and the narrowest",
    )
    group.add_argument("--output", default="runs", help="folder of runs")
    group.add_argument("--experiment", help="name of the run's folder; the model's name if not given")


def add_distillation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of train.py alone: what the subnets learn from."""
    group = parser.add_argument_group("distillation", "what all subnets but the widest learn from")
    add_teacher(group, "another model as the teacher: a pretrained timm model, local-dir:FOLDER, or torchvision/NAME")
    group.add_argument(
        "--distill-teacher",
        choices=("widest", "ema"),
        default="widest",
        help="the widest subnet, or its moving average (DS-Net; needs --model-ema)",
    )
    group.add_argument(
        "--teach-widest",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of --teacher's loss in the loss of the widest; the rest is the loss on the labels",
    )


def add_weight_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flag of the file of weights, in a group that is returned; --pretrained is among those of the model."""
    group = parser.add_argument_group("starting point", "fresh weights if nothing is given")
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE",
        help="local .safetensors, .pth or .bin file of the model's weights; with other classes, all but the classifier",
    )
    return group


def add_starting_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of train.py about where it starts."""
    group = add_weight_flags(parser)
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
    "validate": (add_general_flags, add_model_flags, add_weight_flags),
}  # fmt: skip

# Where a recipe's defaults differ from those of its flags: slim.py starts from a trained model, which forgets if it is
# trained as a fresh one.
DEFAULTS: dict[str, dict[str, Any]] = {
    "slim": {
        "model": None, "batch_size": 64, "held_out": 0.2, "images": 1000, "order": "reconstruction", "opt": "adamw",
        "lr_base": 1e-3,
        "weight_decay": 0.05, "epochs": 10, "warmup_epochs": 1, "scale": [0.7, 1.0], "color_jitter": 0.0,
        "resume": True, "channels_last": True,
    },
    "validate": {"model": None, "zero_init_last": False, "channels_last": True},  # its weights are trained
}  # fmt: skip
