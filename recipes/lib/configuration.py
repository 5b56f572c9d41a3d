"""The values of a recipe's flags: its defaults, then a YAML file, then the command line.

One flat YAML file serves every recipe. A key goes to each recipe that has that flag; with the prefix `train_`,
`search_` or `finetune_` it goes to that recipe alone, and wins over the key without it. The command line wins over the
file.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.checks import check_values
from timm_autoslim.recipes.lib.flags import DEFAULTS, FLAGS
from timm_autoslim.recipes.lib.names import read_data_settings, resolve_name
from timm_autoslim.recipes.lib.parser import ON_OFF, KeyValues, Parser, read_input_size
from timm_autoslim.recipes.lib.width_flags import Choices, read_choices

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def parse_args(recipe: str, doc: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the values of one recipe's flags: defaults, then the YAML file of -c, then the command line.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is of the wrong type or out of range.
    """
    parser = _make_parser(recipe, doc)
    config_parser = Parser(add_help=False)
    config_parser.add_argument("-c", "--config")
    path = config_parser.parse_known_args(argv)[0].config
    if path:
        parser.set_defaults(**pick_values(recipe, read_config(path)))
    args: argparse.Namespace = parser.parse_args(argv)
    check_values(args)
    _join_data(args)
    if hasattr(args, "model"):
        _read_habits(args)
        args.model = args.model and resolve_name(args.model)
        if args.model and args.in_chans is None:
            args.in_chans = read_data_settings(args.model, **args.model_kwargs)["input_size"][0]
    return args


def list_flags(recipe: str, argv: Sequence[str] | None = None) -> set[str]:
    """Return the names of the flags that the command line or the YAML file of -c gives a value."""
    parser = _make_parser(recipe)
    left_out = object()
    parser.set_defaults(**{action.dest: left_out for action in parser._actions if action.dest != "help"})
    values = vars(parser.parse_args(argv))
    config = pick_values(recipe, read_config(values["config"])) if values["config"] is not left_out else {}
    return {name for name, value in values.items() if value is not left_out} | config.keys()


def _read_habits(args: argparse.Namespace) -> None:
    """Let flags that timm has besides be those that they mean: arguments of the model, size and channels."""
    for flag, argument in (("drop", "drop_rate"), ("drop_path", "drop_path_rate")):
        if (value := vars(args).pop(flag)) is not None:
            args.model_kwargs = {argument: value, **args.model_kwargs}
    read_input_size(args)


def _join_data(args: argparse.Namespace) -> None:
    """Let DATA, as in timm's scripts, be --data-dir."""
    data = vars(args).pop("data", None)
    if data and args.data_dir not in (None, data):
        raise ConfigError(f"{data} and --data-dir {args.data_dir} are two folders of images: give one of them.")
    args.data_dir = data or args.data_dir


@functools.cache
def list_actions(recipe: str) -> dict[str, argparse.Action]:
    """Return what argparse knows of each flag of a recipe, by name; --help and --config are left out. Only read it."""
    flags = (action for action in _make_parser(recipe)._actions if action.option_strings)
    return {action.dest: action for action in flags if action.dest not in ("help", "config")}


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check the values that the recipes of all stages would take from a configuration.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong type or out of range.
    """
    for recipe in ("train", "search", "finetune"):
        parser = _make_parser(recipe)
        parser.set_defaults(**pick_values(recipe, config, where))
        check_values(parser.parse_args([] if recipe == "train" else ["RUN"]))


def read_config(path: str | Path) -> dict[str, Any]:
    """Read one flat YAML file and check its keys and values; dashes and underscores mean the same.

    The path may be the name of a file that comes with the recipes, such as digits.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is of the wrong type.
    """
    file = find_config(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"The configuration {path} must be `key: value` lines, but holds a {type(content).__name__}.")
    config = {str(key).replace("-", "_"): value for key, value in content.items()}
    for recipe in FLAGS:  # all keys and values are checked, not only those of the recipe that reads the file
        pick_values(recipe, config, where=str(path))
    return config


def find_config(path: str | Path) -> Path:
    """Return a configuration's file: the path itself, or the file of this name that comes with the recipes.

    Raises:
        ConfigError: there is neither.
    """
    if Path(path).exists():
        return Path(path)
    names = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    name = Path(path).name.removesuffix(".yaml")
    if name in names and Path(path).parent.name in ("", "configs"):
        return names[name]
    near = difflib.get_close_matches(name, names, n=1)
    raise ConfigError(
        f"The configuration {path} cannot be read: there is no such file, and none of {', '.join(names)}."
        + (f" Did you mean {near[0]}?" if near else "")
    )


def pick_values(recipe: str, config: Mapping[str, Any], where: str = "the configuration") -> dict[str, Any]:
    """Return the values for one recipe, of the types that its flags have.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong type.
    """
    actions = {name: list_actions(name) for name in FLAGS}
    spellings = {key for name in FLAGS for flag in actions[name] for key in (flag, f"{name}_{flag}")}
    shared, prefixed = {}, {}
    for key, value in config.items():
        if key not in spellings:
            raise ConfigError(
                f"Unknown key {key!r} in {where}: no recipe has it. The nearest is {_nearest(key, spellings)!r}."
            )
        flag = key.removeprefix(f"{recipe}_")
        if key != flag and flag in actions[recipe]:
            prefixed[flag] = _convert(actions[recipe][flag], key, value, where)
        elif key in actions[recipe]:
            shared[key] = _convert(actions[recipe][key], key, value, where)
    return shared | prefixed


def _nearest(key: str, spellings: set[str]) -> str:
    rest = key.partition("_")[2]  # of a flag with the prefix of a recipe that lacks it
    return rest if rest in spellings else difflib.get_close_matches(key, sorted(spellings), n=1, cutoff=0.0)[0]


def _make_parser(recipe: str, doc: str | None = None) -> Parser:
    parser = Parser(description=doc)
    for add_flags in FLAGS[recipe]:
        add_flags(parser)
    parser.set_defaults(**DEFAULTS.get(recipe, {}))
    return parser


def _convert(action: argparse.Action, key: str, value: object, where: str) -> object:
    """Check one YAML value and convert it as the command line would; `null` means the flag's default."""
    convert: Callable[[Any], Any] = action.type if callable(action.type) else str
    kind = getattr(action.type, "__name__", "text")
    if value is None:
        return copy.deepcopy(action.default)
    if isinstance(action, Choices):
        return read_choices(value)
    try:
        if isinstance(action, ON_OFF):
            needed = "true or false"
            return _expect(value, bool)
        if isinstance(action, KeyValues):
            needed = "a mapping"
            return _expect(_read_pairs(value, key) if isinstance(value, (str, list)) or value is True else value, dict)
        if action.nargs is not None:
            needed = f"a list of {action.nargs} {kind}s" if isinstance(action.nargs, int) else f"a list of {kind}s"
            items = value if isinstance(value, list) else [value]
            if isinstance(action.nargs, int) and len(items) != action.nargs:
                raise ValueError
            items = [convert(_expect(str(item) if not isinstance(item, (dict, list)) else item, str)) for item in items]
            if action.choices and not set(items) <= set(action.choices):
                needed = "a list of " + ", ".join(map(repr, action.choices))
                raise ValueError
            return items
        needed = kind
        item = convert(_expect(value if isinstance(value, (dict, list, bool)) else str(value), str))
        if action.choices and item not in action.choices:
            needed = "one of " + ", ".join(map(repr, action.choices))
            raise ValueError
        return item
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {value!r} in {where} does not fit: it needs {needed}.") from error


def _read_pairs(value: Any, key: str) -> Any:
    """Read KEY=VALUE as on a command line: one, several, or none (True)."""
    pairs = [] if value is True else [value] if isinstance(value, str) else value
    if not all(isinstance(pair, str) for pair in pairs):
        return value
    parser = Parser(add_help=False)
    parser.add_argument(f"--{key}", nargs="*", default={}, action=KeyValues)
    return vars(parser.parse_args([f"--{key}", *pairs]))[key]


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value
