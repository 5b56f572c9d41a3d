"""What the recipes share: the YAML configuration of their flags, the files of a run folder, the model and its supernet.

One flat YAML file serves every recipe. A key goes to each recipe that has that flag; with the prefix `train_`,
`search_` or `finetune_` it goes to that recipe alone, and wins over the plain key. The command line wins over the file.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from flags import FLAGS, ON_OFF
from safetensors.torch import load_model, save_model
from timm.data import resolve_data_config
from timm.utils import ParseKwargs
from torch import Tensor, nn

import timm_autoslim
from timm_autoslim.artifact import bases as registry
from timm_autoslim.errors import AutoSlimError, ConfigError
from timm_autoslim.utils.files import replace_file, write_text

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


def check_numbers(args: argparse.Namespace, least: Mapping[int, Sequence[str]]) -> None:
    """Refuse numbers that cannot be, before any work is done; flags that were not given pass.

    Args:
        args: the flags of a recipe.
        least: flags of this recipe by the least that they can be; those of all recipes are known.

    Raises:
        ConfigError: one is too small, or the seed is none that NumPy takes too.
    """
    needed = [
        (0, "threads"),
        (0, "workers"),
        (1, "batch_size"),
        *((n, flag) for n, flags in least.items() for flag in flags),
    ]
    for number, flag in needed:
        given = getattr(args, flag)
        if given is not None and given < number:
            raise ConfigError(f"--{flag.replace('_', '-')} {given}: needed {number} or more.")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed {args.seed}: needed a number from 0 to {2**32 - 1}.")


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
    """Write a file whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters and buffers as safetensors, whole or not at all."""
    with replace_file(path) as part:
        save_model(model, str(part))


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
