"""Command line: `python -m timm_autoslim COMMAND`, or `autoslim COMMAND` for short; `--help` lists the commands."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
import types
from argparse import Namespace
from pathlib import Path

import timm
import torch

from timm_autoslim import __version__
from timm_autoslim.costs.inspection import inspect as inspect_model
from timm_autoslim.errors import ArtifactError, AutoSlimError, TraceError
from timm_autoslim.recipes.lib.names import choose_size_args, create_meta, resolve_name
from timm_autoslim.recipes.lib.parser import KeyValues, Parser, read_input_size
from timm_autoslim.recipes.lib.width_flags import add_width_flags


def inspect(name: str, args: Namespace) -> str:
    """Return a description of how a model can be slimmed: groups, reach, what is fixed and why, and the time it took.

    Args:
        name: a timm name, `torchvision/NAME`, a folder, or a repository of the Hub.
        args: the flags of the command.

    Raises:
        ConfigError: the name is unknown.
        ArtifactError: the constructor refuses the arguments.
        TraceError: the model cannot be traced, or not at this size.
        NothingToSlimError: no channel of it can be removed.
        WidthError: a rule matches nothing, or is out of range.
    """
    example, name = None, resolve_name(name)
    read_input_size(args)
    flags = {key: value for key in ("num_classes", "in_chans") if (value := getattr(args, key)) is not None}
    kwargs = {**flags, **args.model_kwargs}
    if args.img_size is not None:
        try:
            example = torch.empty(1, kwargs.get("in_chans", 3), args.img_size, args.img_size, device="meta")
        except (RuntimeError, TypeError) as error:
            raise TraceError(
                f"--img-size {args.img_size}: no image has this height and width ({error}); needed: pixels, such as 224"
            ) from error
        kwargs = {**choose_size_args(name, args.img_size), **kwargs}
    rules = {"freeze": args.freeze, "min": args.min_width, "divisor": args.divisor, "choices": args.choices or None}
    inspection = inspect_model(create_meta(name, **kwargs), example, **rules)  # shapes are all that is read
    if args.json:
        return json.dumps({"model": name, "model_kwargs": kwargs, **rules, **inspection.to_dict()}, indent=1)
    lines = [f"{name}: {len(inspection.groups)} groups, traced and proven in {inspection.seconds:.1f} s", ""]
    lines += [str(inspection), *(["", inspection.list_modules()] if args.modules else [])]
    return "\n".join(lines)


def report(run: Path) -> Path:
    """Write the report of a run folder, and return the path of its page.

    Raises:
        ArtifactError: the folder holds no results that can be read, or a package that draws is not installed.
    """
    try:
        from timm_autoslim.slimming.report import write_report  # what it draws with is an extra
    except ModuleNotFoundError as error:
        raise ArtifactError(f"the report needs {error.name}: pip install 'timm-autoslim[recipes]'") from error
    return write_report(run)


def run(script: str, args: list[str]) -> int:
    """Run a script as `python SCRIPT ARGS...` would, with the entrypoint of exported folders registered.

    Args:
        script: path of a Python source file, such as timm's validate.py.
        args: the script's own arguments.

    Returns:
        The exit status: 0 when the script came to its end, 1 when it raised (the traceback has been printed by
        `sys.excepthook`), 2 when there is no such file to read. What the script passes to `sys.exit` is left to pass.
    """
    try:
        with open(script, "rb") as file:
            source = file.read()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        print(
            f"error: {script}: cannot be read ({reason}), needed the path of a Python script; "
            "python -m timm_autoslim run SCRIPT [ARGS...]",
            file=sys.stderr,
        )
        return 2
    sys.excepthook = sys.__excepthook__  # Ctrl-C shows the script's traceback
    main = types.ModuleType("__main__")
    path = os.path.abspath(script)
    # The new __main__ stays in place: worker processes, pickles and exit handlers look their functions up in it.
    vars(main).update(__file__=path, __package__=None, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = main
    sys.argv = [script, *args]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    try:
        exec(compile(source, path, "exec", dont_inherit=True), vars(main))
    except Exception as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this function's frame
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


PROG = "python -m timm_autoslim"

# Commands that are recipes: the module, and what it does. Each has a parser of its own.
RECIPES = {
    "slim": ("slim", "slim a trained model to some budgets: search, reconstruct, fine-tune, export, compare"),
    "train": ("train", "train a slimmable supernet"),
    "search": ("search", "search the networks of a run for some budgets"),
    "finetune": ("finetune", "fine-tune, test and export a network of a search"),
    "validate": ("validate", "test a model on the test images of a folder"),
    "all": ("run", "all of the three, and compare the networks; by default on scikit-learn's digits"),
}


def run_recipe(command: str, args: list[str]) -> None:
    """Run a recipe; errors end the process with a message, as when it is run as a script.

    Args:
        command: a key of `RECIPES`.
        args: the recipe's own arguments.
    """
    try:
        recipe = importlib.import_module(f"timm_autoslim.recipes.{RECIPES[command][0]}")
        shell = importlib.import_module("timm_autoslim.recipes.lib.shell")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {command} needs {error.name}: pip install 'timm-autoslim[recipes]'")
    sys.argv = [f"{PROG} {command}", *args]  # the name that the recipe's messages have
    again = {"again": recipe.AGAIN} if hasattr(recipe, "AGAIN") else {}
    shell.run_command(lambda: recipe.main(args), **again)


def copy(folder: Path) -> str:
    """Copy the recipes to a new folder; return what can be done there.

    Raises:
        OutputExistsError: the folder holds something already.
    """
    from timm_autoslim.recipes.lib.copies import copy_recipes

    scripts = copy_recipes(folder)
    return "\n".join([f"Copied to {folder}, with all that they share. Start with:", *map(str, scripts)])


def _make_parser() -> Parser:
    parser = Parser(prog=PROG, description="Slim any timm or torchvision model.")
    versions = f"timm-autoslim {__version__} (torch {torch.__version__}, timm {timm.__version__})"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in RECIPES.items():
        commands.add_parser(name, help=text, add_help=False)  # the recipe itself parses what follows
    look = commands.add_parser(
        "inspect", help="show the channel groups of a model, its reach, and what is fixed and why"
    )
    look.add_argument("model", help="a timm name, torchvision/NAME, a folder, or hf-hub:OWNER/NAME")
    look.add_argument("--img-size", "--size", type=int, help="height and width of the images")
    look.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="--in-chans and --img-size")
    look.add_argument("--in-chans", type=int, help="channels of the images")
    look.add_argument("--num-classes", type=int, help="classes of the model")
    look.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE")
    add_width_flags(look)
    look.add_argument("--modules", action="store_true", help="also list the MACs of every module")
    look.add_argument("--json", action="store_true", help="print all of it as JSON, that of the modules too")
    show = commands.add_parser("report", help="write RUN/report.html and figures of all RUN/search/*.json")
    show.add_argument("run", metavar="RUN", type=Path, help="folder of a run that was searched")
    copies = commands.add_parser("recipes", help="copy the recipes to a new folder, to change them there")
    copies.add_argument("folder", metavar="DIR", type=Path, help="the folder to create")
    start = commands.add_parser(
        "run",
        help="run a script, such as timm's validate.py, that is to load exported folders: --model local-dir:FOLDER",
    )
    start.add_argument("script", metavar="SCRIPT", help="path of a Python script (for all stages of the recipes: all)")
    start.add_argument("args", metavar="ARGS", nargs="*", default=[], help="the script's own arguments")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["run"] and len(words) > 1 and not words[1].startswith("-"):
        return run(words[1], words[2:])  # past argparse, which would drop a `--` among the script's arguments
    if words and words[0] in RECIPES:
        run_recipe(words[0], words[1:])
        return 0
    if words[:1] == ["run"] and (len(words) == 1 or words[1] in ("-c", "--config", "--num-processes", "--output")):
        print("(all stages of the recipes are the command `all`)", file=sys.stderr)
    args = _make_parser().parse_args(words)
    if args.command == "run":  # after a `--`
        return run(args.script, args.args)
    try:
        if args.command == "report":
            print(report(args.run))
        elif args.command == "recipes":
            print(copy(args.folder))
        else:
            print(inspect(args.model, args))
    except AutoSlimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
