"""What the small scripts beside this file share: timm's own scripts import nothing of each other."""

import argparse

import timm
from timm.utils import ParseKwargs


def parser_with(*data):
    """Flags that validate.py, inference.py, benchmark.py and train.py of timm all have, by their names and defaults."""
    parser = argparse.ArgumentParser()
    for name in data:
        parser.add_argument(name, nargs="?")
    parser.add_argument("--model", "-m", default="resnet50")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--num-classes", type=int, default=None)
    parser.add_argument("--img-size", type=int, default=None)
    parser.add_argument("--in-chans", type=int, default=None)
    parser.add_argument("--gp", default=None)
    parser.add_argument("--batch-size", "-b", type=int, default=2)
    parser.add_argument("--workers", "-j", type=int, default=0)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--torchscript", action="store_true")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    return parser


def create(args, **kwargs):
    """Create the model as timm's scripts do: through `resolve_model_input_args` where this timm has it."""
    resolve = getattr(timm.models, "resolve_model_input_args", None)
    if resolve is None:
        return timm.create_model(args.model, in_chans=args.in_chans or 3, **kwargs)
    return timm.create_model(**resolve(args.model, vars(args), **kwargs))
