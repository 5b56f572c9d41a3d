"""The flags of the recipes, in groups; names and defaults are those of timm's train.py where it has them."""

from __future__ import annotations

import argparse

from timm.utils import ParseKwargs

from timm_autoslim.supernet.order import CRITERIA

ON_OFF = argparse.BooleanOptionalAction


def general_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every recipe."""
    group = parser.add_argument_group("general")
    group.add_argument("-c", "--config", metavar="FILE", help="flat YAML file with values for these flags")
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with train and val|validation|test, each a folder of class folders or one .tar of them",
    )
    group.add_argument("-b", "--batch-size", type=int, default=128, help="images per process and step")
    group.add_argument("-j", "--workers", type=int, default=0, help="processes that load images")
    group.add_argument("--seed", type=int, default=42)
    group = parser.add_argument_group("device and precision")
    group.add_argument("--threads", type=int, default=0, help="CPU threads per process; 0: leave torch's choice")
    group.add_argument("--amp", action=ON_OFF, default=False, help="mixed precision")
    group.add_argument("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16")
    group.add_argument("--channels-last", action=ON_OFF, default=False, help="NHWC memory layout")


def model_flags(parser: argparse.ArgumentParser) -> None:
    """What is slimmed, on which images: fixed by train.py and kept in the run folder's args.yaml."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", default="resnet18", help="a timm model, or torchvision/NAME")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="KEY=VALUE",
        help="such as drop_rate=0.2 drop_path_rate=0.1",
    )
    group.add_argument("--pretrained", action=ON_OFF, default=False, help="start from pretrained weights")
    group.add_argument("--num-classes", type=int, help="taken from the data if not given")
    group.add_argument("--in-chans", type=int, default=3)
    group.add_argument("--img-size", type=int, help="side of the square input; the model's own if not given")
    group.add_argument("--mean", type=float, nargs="+", help="per channel; the model's own if not given")
    group.add_argument("--std", type=float, nargs="+", help="per channel; the model's own if not given")
    group.add_argument("--interpolation", help="of resizing; the model's own if not given")
    group.add_argument("--crop-pct", type=float, help="centre crop of evaluation; the model's own if not given")
    group.add_argument("--freeze", nargs="*", default=[], metavar="GLOB", help="modules whose channels all stay")
    group.add_argument("--min-width", type=float, help="narrowest share of every group's channels")
    group.add_argument("--divisor", type=int, help="widths are multiples of this")
    group.add_argument(
        "--choices",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="GLOB=[...]",
        help="the widths of the groups that a glob matches, such as layer1*=[8,16,32]; wins over the two above",
    )
    group.add_argument(
        "--dataset",
        help="'digits' (scikit-learn's, the default without --data-dir) or a name that timm's create_dataset knows",
    )
    group.add_argument("--limit-train", type=float, default=1.0, help="share, or number, of the training images")
    group.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        help="share, or number, of the training images that are kept for the search",
    )


def training_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the recipes that train; names and defaults are those of timm's train.py where it has them."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="sgd", help="a timm optimizer")
    group.add_argument("--opt-eps", type=float, help="the optimizer's own if not given")
    group.add_argument("--opt-betas", type=float, nargs="+", help="the optimizer's own if not given")
    group.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=2e-5)
    group.add_argument("--clip-grad", type=float, help="value above which gradients are clipped, once an update")
    group.add_argument("--clip-mode", choices=("norm", "value", "agc"), default="norm")
    group.add_argument("--grad-accum-steps", type=int, default=1, help="batches of an update, with the same widths")
    group = parser.add_argument_group("learning rate schedule")
    group.add_argument("--epochs", type=int, default=300)
    group.add_argument("--lr", type=float, help="learning rate; overrides --lr-base")
    group.add_argument("--lr-base", type=float, default=0.1, help="learning rate at --lr-base-size images an update")
    group.add_argument("--lr-base-size", type=int, default=256)
    group.add_argument(
        "--lr-base-scale",
        choices=("linear", "sqrt"),
        help="how it grows with the images of an update; by default sqrt for adaptive optimizers, else linear",
    )
    group.add_argument("--sched", default="cosine", help="a timm scheduler")
    group.add_argument("--warmup-epochs", type=float, default=0)
    group.add_argument("--warmup-lr", type=float, default=1e-5)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--decay-epochs", type=float, default=90, help="interval of the step schedule")
    group.add_argument("--decay-rate", type=float, default=0.1, help="factor of step, exponent of poly")
    group = parser.add_argument_group("augmentation and regularization")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect of the random crop")
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
    group = parser.add_argument_group("batch norm")
    group.add_argument("--sync-bn", action=ON_OFF, default=False, help="statistics over the batches of all processes")
    group.add_argument("--calibration-images", type=int, default=2048, help="training images that measure statistics")
    group = parser.add_argument_group("model exponential moving average")
    group.add_argument("--model-ema", action=ON_OFF, default=False, help="the result is the weights' moving average")
    group.add_argument("--model-ema-decay", type=float, default=0.9998)
    group = parser.add_argument_group("checkpoints and tracking")
    group.add_argument("--resume", action=ON_OFF, default=False, help="go on after the last checkpoint")
    group.add_argument(
        "--recovery-interval",
        type=int,
        default=0,
        help="updates between checkpoints within an epoch; 0: only after each epoch",
    )
    group.add_argument("--checkpoint-hist", type=int, default=2, help="how many checkpoints are kept")
    group.add_argument("--val-interval", type=int, default=1, help="epochs between validations")
    group.add_argument("--log-interval", type=int, default=20, help="updates between looks at the loss")
    group.add_argument("--log-tensorboard", action=ON_OFF, default=False, help="curves in RUN/tensorboard")
    group.add_argument("--log-wandb", action=ON_OFF, default=False, help="curves at Weights & Biases")
    group.add_argument("--wandb-project", default="timm-autoslim", help="project of --log-wandb")


def train_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of train.py alone."""
    group = parser.add_argument_group("supernet")
    group.add_argument("--sandwich", type=int, default=4, help="subnets a step: widest, narrowest and random ones")
    group.add_argument(
        "--sampler",
        choices=("independent", "multiplier"),
        default="independent",
        help="random widths: each group on its own (AutoSlim), or one multiplier for all (US-Nets)",
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
    group = parser.add_argument_group("distillation", "what all subnets but the widest learn from")
    group.add_argument(
        "--distill-loss",
        choices=("kl", "alpha"),
        default="kl",
        help="cross-entropy with soft labels, or the adaptive alpha-divergence (AlphaNet)",
    )
    group.add_argument("--distill-temperature", type=float, default=1.0, help="softens teacher and learner")
    group.add_argument(
        "--distill-teacher",
        choices=("widest", "ema"),
        default="widest",
        help="the widest itself, or its moving average (DS-Net; needs --model-ema)",
    )
    group.add_argument(
        "--teacher",
        metavar="NAME",
        help="an outside teacher instead: a timm model with pretrained weights, local-dir:FOLDER, or torchvision/NAME",
    )
    group.add_argument("--teacher-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    group.add_argument(
        "--teach-widest",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the outside teacher's loss in that of the widest; the rest is the labels'",
    )


def starting_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of train.py about where it starts; --pretrained is among those of the model."""
    group = parser.add_argument_group("starting point", "fresh weights if nothing is given")
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE",
        help="local .safetensors, .pth or .bin file of weights of the model; of other classes, all but the classifier",
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
        help="first sort the channels by importance, so that narrow subnets have the best (Once-for-All); a criterion "
        "of torch-pruning",
    )
    group.add_argument(
        "--order-images", type=int, default=512, help="training images whose gradients --order taylor looks at"
    )


def search_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of search.py alone."""
    parser.add_argument("run", help="a run folder of train.py")
    group = parser.add_argument_group("search")
    group.add_argument(
        "--budgets",
        nargs="+",
        default=["macs=50%"],
        metavar="UNIT=AMOUNT",
        help="such as macs=50%% (of the widest), macs=300M or params=2.5M; several limits for one network are quoted: "
        "'macs<=300M and params<=2M'; units: macs, params, peak_bytes, latency_ms",
    )
    group.add_argument("--cost-batch-size", type=int, default=1, help="images that peak_bytes and latency_ms are for")
    group.add_argument("--latency-table", help="file of measured operators; default: latency.json of the run folder")
    group.add_argument("--latency-device", default="cpu", help="device that latency_ms is for, such as cpu or cuda:0")
    group.add_argument(
        "--latency-runtime",
        choices=("eager", "compile", "onnxruntime"),
        default="eager",
        help="how the network will run there",
    )
    group.add_argument("--latency-threads", type=int, default=1, help="threads of the processor")
    group.add_argument(
        "--mode",
        choices=("fast", "reference"),
        default="fast",
        help="fast: score few candidates on some of the images; reference: all on all, as published",
    )
    group.add_argument(
        "--rank",
        choices=("error", "per_cost"),
        default="per_cost",
        help="keep the candidate with the least error, or with the least error per unit of cost saved",
    )
    group.add_argument(
        "--steps", type=int, help="steps from a group's full width to its narrowest; 5 in the fast mode, else 10"
    )
    group.add_argument(
        "--refine",
        choices=("units", "choices", "none"),
        default="units",
        help="fill what the greedy descent leaves of a budget: to within 1 %%, with single channels where multiples of "
        "the divisor do not do it; or with these alone; or not at all",
    )
    group.add_argument(
        "--baselines",
        nargs="*",
        choices=("uniform", "random", "importance", "evolutionary"),
        default=["uniform"],
        help="simpler methods to compare the search with, scored and counted in the same way",
    )
    group.add_argument("--candidates", type=int, default=100, help="subnets that random and evolutionary draw a budget")
    group.add_argument(
        "--criterion",
        choices=("l1", "l2", "bn_scale", "fpgm", "lamp"),
        default="l2",
        help="torch-pruning's, by which importance ranks the channels",
    )
    group.add_argument("--images", type=int, default=0, help="held-out images that score a candidate; 0: all")


def finetune_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of finetune.py alone."""
    parser.add_argument("run", help="a run folder with a search.json")
    group = parser.add_argument_group("network")
    group.add_argument("--network", help="name of a network in search.json")
    group.add_argument("--from-scratch", action=ON_OFF, default=False, help="fresh weights, not the supernet's")


FLAGS = {
    "train": (general_flags, model_flags, starting_flags, training_flags, train_flags),
    "search": (general_flags, search_flags),
    "finetune": (general_flags, training_flags, finetune_flags),
}
