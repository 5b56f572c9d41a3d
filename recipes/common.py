"""What the recipes share: their flags, the YAML configuration, the files of a run folder, the model and its supernet.

One flat YAML file serves every recipe. A key goes to each recipe that has that flag; with the prefix `train_`,
`search_` or `finetune_` it goes to that recipe alone, and wins over the plain key. The command line wins over the file.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import load_model, save_model
from timm.data import resolve_data_config
from timm.utils import ParseKwargs
from torch import Tensor, nn

import timm_autoslim
from timm_autoslim import registry
from timm_autoslim.errors import AutoSlimError, ConfigError
from timm_autoslim.importance import CRITERIA

ON_OFF = argparse.BooleanOptionalAction


# ---------------------------------------------------------------------------------------------------------- flags


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
    group.add_argument("--steps", type=int, default=10, help="steps from a group's full width to its narrowest")
    group.add_argument(
        "--refine", action=ON_OFF, default=True, help="fill what the greedy descent leaves of a budget, to within 1 %%"
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


# ------------------------------------------------------------------------------------------------- configuration


def parse_args(recipe: str, doc: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of one recipe: defaults, then the YAML file of -c, then the command line.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is of the wrong type.
    """
    parser = _parser(recipe, doc)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("-c", "--config")
    path = early.parse_known_args(argv)[0].config
    if path:
        parser.set_defaults(**values_for(recipe, read_config(path)))
    return parser.parse_args(argv)


def command(main: Callable[[], None]) -> None:
    """Run a recipe from the shell: what the user can mend is a message, not a traceback."""
    try:
        main()
    except AutoSlimError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def read_config(path: str | Path) -> dict[str, Any]:
    """Read one flat YAML file and check its keys; dashes and underscores mean the same."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"The configuration {path} must be `key: value` lines, but holds a {type(content).__name__}.")
    config = {str(key).replace("-", "_"): value for key, value in content.items()}
    for recipe in FLAGS:  # checks every key and value, not only those of the recipe that reads the file
        values_for(recipe, config, where=str(path))
    return config


def values_for(recipe: str, config: Mapping[str, Any], where: str = "the configuration") -> dict[str, Any]:
    """Pick what concerns one recipe, typed as its flags are."""
    known = {name: {action.dest: action for action in _actions(name)} for name in FLAGS}
    spellings = {key for name in FLAGS for dest in known[name] for key in (dest, f"{name}_{dest}")}
    plain, prefixed = {}, {}
    for key, value in config.items():
        if key not in spellings:
            rest = key.partition("_")[2]  # a known key with the prefix of a recipe that lacks it
            near = rest if rest in spellings else difflib.get_close_matches(key, sorted(spellings), n=1, cutoff=0.0)[0]
            raise ConfigError(f"Unknown key {key!r} in {where}: no recipe has it. The nearest is {near!r}.")
        own = key.removeprefix(f"{recipe}_")
        if key != own and own in known[recipe]:
            prefixed[own] = _typed(known[recipe][own], key, value, where)
        elif key in known[recipe]:
            plain[key] = _typed(known[recipe][key], key, value, where)
    return plain | prefixed


def _parser(recipe: str, doc: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for add_flags in FLAGS[recipe]:
        add_flags(parser)
    return parser


def _actions(recipe: str) -> list[argparse.Action]:
    flags = (action for action in _parser(recipe)._actions if action.option_strings)
    return [action for action in flags if action.dest not in ("help", "config")]


def _typed(action: argparse.Action, key: str, value: object, where: str) -> object:
    """Check and convert one YAML value as the command line would; `null` means the flag's default."""
    needed = getattr(action.type, "__name__", "text")
    try:
        if value is None:
            return action.default
        if isinstance(action, ON_OFF):
            needed = "true or false"
            return _expect(value, bool)
        if isinstance(action, ParseKwargs):
            needed = "a mapping"
            return _expect(value, dict)
        convert = action.type or str
        if action.nargs is not None:
            needed = f"a list of {needed}"
            items = value if isinstance(value, list) else [value]
            if isinstance(action.nargs, int) and len(items) != action.nargs:
                raise ValueError
            items = [convert(_expect(str(item) if not isinstance(item, (dict, list)) else item, str)) for item in items]
            if action.choices and not set(items) <= set(action.choices):
                needed = "a list of " + ", ".join(map(repr, action.choices))
                raise ValueError
            return items
        result = convert(_expect(value if isinstance(value, (dict, list, bool)) else str(value), str))
        if action.choices and result not in action.choices:
            needed = "one of " + ", ".join(map(repr, action.choices))
            raise ValueError
        return result
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {value!r} in {where} does not fit: it needs {needed}.") from error


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


# ---------------------------------------------------------------------------------------------------- run folder


def write_json(path: Path, content: object) -> None:
    """Write a file whole or not at all: to a temporary name first, then renamed."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters and buffers as safetensors, whole or not at all."""
    part = path.with_name(path.name + ".part")
    save_model(model, str(part))
    sync(part)
    os.replace(part, path)


def sync(path: Path) -> None:
    """Force a file or a folder to the disk, so that a rename cannot outlive its content in a crash of the machine."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and needs no such thing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_weights(path: Path, model: nn.Module) -> None:
    """Load what `write_weights` wrote, strictly."""
    load_model(model, str(path))


def write_args(folder: Path, args: argparse.Namespace) -> None:
    """Keep the flags that a run used beside its results."""
    write_text(folder / "args.yaml", yaml.safe_dump(vars(args), sort_keys=False))


def read_args(folder: Path, args: argparse.Namespace) -> argparse.Namespace:
    """Model and data flags of the run's train.py, with the recipe's own flags laid over them.

    Raises:
        ConfigError: the folder holds no training.
    """
    path = folder / "args.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it holds no args.yaml. Train first: recipes/train.py.")
    trained = yaml.safe_load(path.read_text(encoding="utf-8"))
    return argparse.Namespace(**trained | vars(args) | {"data_dir": args.data_dir or trained["data_dir"]})


# ---------------------------------------------------------------------------------------------- model and supernet


def base_args(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments that make the base model again, as they are kept in an exported folder."""
    return {"num_classes": args.num_classes, "in_chans": args.in_chans, **args.model_kwargs}


def make_model(args: argparse.Namespace, pretrained: bool = False) -> nn.Module:
    """Create the base model, on whatever device is the default one."""
    weights: dict[str, Any] = {}
    if pretrained:
        weights = {"weights": "DEFAULT"} if args.model.startswith("torchvision/") else {"pretrained": True}
    return registry.create_base(args.model, **base_args(args), **weights)


def resolve_input(args: argparse.Namespace, model: nn.Module) -> None:
    """Fill in the flags about the input that were not given: from the model, with as many means as channels."""
    data = resolve_data_config(vars(args), model=model)
    args.img_size = data["input_size"][-1]
    args.interpolation, args.crop_pct = data["interpolation"], data["crop_pct"]
    for key in ("mean", "std"):
        setattr(args, key, _per_channel(data[key], args.in_chans))


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    values = list(values)
    return values if len(values) == channels else [sum(values) / len(values)] * channels


def make_supernet(args: argparse.Namespace, model: nn.Module | None = None) -> timm_autoslim.Supernet:
    """Convert the base model; without one create it, with fresh weights."""
    model = make_model(args) if model is None else model
    resolve_input(args, model)
    example = torch.zeros(2, args.in_chans, args.img_size, args.img_size)  # (N, C, H, W)
    return timm_autoslim.convert(
        model, example, freeze=args.freeze, min=args.min_width, divisor=args.divisor, choices=args.choices,
        base=args.model, base_args=base_args(args),
    )  # fmt: skip


class Teacher(nn.Module):
    """A frozen model that takes the student's inputs, and undoes the student's normalisation for its own."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        super().__init__()
        self.model = model
        data = resolve_data_config({}, model=model)
        own = [_per_channel(data[key], args.in_chans) for key in ("mean", "std")]
        self.same = own == [list(args.mean), list(args.std)]
        mean, std, own_mean, own_std = (
            torch.tensor(v).view(-1, 1, 1) for v in (args.mean, args.std, *own)
        )  # (C, 1, 1)
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)
        self.eval().requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, classes) of inputs (N, C, H, W) that are normalised for the student."""
        return self.model(inputs if self.same else inputs * self.scale + self.shift)


def make_teacher(args: argparse.Namespace) -> Teacher:
    """Create --teacher with its trained weights; `args` describe the student, whose input is resolved already.

    Raises:
        ConfigError: it cannot be created, has no weights, or does not take the images or know the classes.
    """
    name = f"local-dir:{args.teacher}" if Path(args.teacher).is_dir() else args.teacher
    kwargs = {"in_chans": args.in_chans, **args.teacher_kwargs}
    image = torch.zeros(1, args.in_chans, args.img_size, args.img_size)  # (N, C, H, W)
    try:
        if name.startswith("torchvision/"):
            model = registry.create_base(name, weights="DEFAULT", **args.teacher_kwargs)
        else:
            model = timm.create_model(name, pretrained=True, **kwargs)
        teacher = Teacher(model, args)
        with torch.no_grad():
            outputs = teacher(image)
    except Exception as error:  # whatever a model raises, from its constructor, its download or its forward
        raise ConfigError(
            f"--teacher {args.teacher} gives no logits of images {tuple(image.shape[1:])}: {error}. Name a timm model "
            "that has pretrained weights, or a folder that timm loads; --teacher-kwargs may help."
        ) from error
    if outputs.shape != (1, args.num_classes):
        raise ConfigError(
            f"--teacher {args.teacher} has outputs {tuple(outputs.shape[1:])}, but the data have {args.num_classes} "
            "classes: fine-tune it on these data first."
        )
    return teacher


def load_supernet(run: Path, args: argparse.Namespace) -> timm_autoslim.Supernet:
    """Make the run's supernet with its trained weights.

    Raises:
        ConfigError: the training has not finished.
    """
    path = run / "supernet.safetensors"
    if not path.is_file():
        raise ConfigError(f"{run} holds no supernet.safetensors: finish its training first: recipes/train.py --resume.")
    supernet = make_supernet(args)
    read_weights(path, supernet.model)
    return supernet
