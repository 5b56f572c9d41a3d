"""The base model and its supernet, as the flags say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from timm_autoslim import Supernet, convert
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.names import choose_size_args, create_named, is_stored, read_data_settings
from timm_autoslim.recipes.lib.run_folder import SUPERNET, read_weights

M = TypeVar("M", bound=nn.Module)


def choose_base_args(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that create the base model again; an exported folder keeps them."""
    base_args: dict[str, Any] = {"num_classes": args.num_classes, "in_chans": args.in_chans}
    if args.img_size:
        base_args |= choose_size_args(args.model, args.img_size)
    return {**base_args, **args.model_kwargs}


def describe_base(args: argparse.Namespace) -> dict[str, Any]:
    """Return how the base is named when it is converted or exported; a stored model says that itself."""
    return {} if is_stored(args.model) else {"base": args.model, "base_args": choose_base_args(args)}


def create_model(args: argparse.Namespace, pretrained: bool = False) -> nn.Module:
    """Create the base model, on the current default device."""
    return create_named(args.model, pretrained=pretrained, **choose_base_args(args))


def set_layout(args: argparse.Namespace, model: M) -> M:
    """Return the model, with its weights in the memory layout of --channels-last."""
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def count_pretrained_classes(args: argparse.Namespace) -> int:
    """Return how many classes the model's own weights have."""
    return int(read_data_settings(args.model, **args.model_kwargs)["num_classes"])


def resolve_input(args: argparse.Namespace, model: nn.Module) -> None:
    """Fill in the flags about the images that were not given: as the model has them."""
    data = resolve_data_config(vars(args), model=model)
    args.img_size = data["input_size"][-1]
    args.interpolation, args.crop_pct, args.crop_mode = data["interpolation"], data["crop_pct"], data["crop_mode"]
    for key in ("mean", "std"):
        setattr(args, key, fit_channels(data[key], args.in_chans))


def describe_input(model: Any, args: argparse.Namespace) -> None:
    """Write into the model's `pretrained_cfg` how its images were prepared, for timm to read in the exported folder.

    All of it comes from the flags, which `resolve_input` has filled in and the loaders use; what the base says about
    other sizes is dropped.
    """
    of_other_sizes = ("test_input_size", "test_crop_pct", "pool_size")
    config = {key: value for key, value in model.pretrained_cfg.items() if key not in of_other_sizes}
    model.pretrained_cfg = {
        **config, "num_classes": args.num_classes, "crop_pct": args.crop_pct, "crop_mode": args.crop_mode,
        "input_size": (args.in_chans, args.img_size, args.img_size), "mean": tuple(args.mean), "std": tuple(args.std),
        "interpolation": args.interpolation,
    }  # fmt: skip


def fit_channels(values: Sequence[float], channels: int) -> list[float]:
    """Return one value for each channel: the values as they are, or their mean where the model has other channels."""
    values = list(values)
    return values if len(values) == channels else [sum(values) / len(values)] * channels


def checkpoint_gradients(model: Any, args: argparse.Namespace, on: bool = True) -> None:
    """Let a model compute activations again in the backward pass, if the flags say so.

    Raises:
        ConfigError: it cannot.
    """
    if not args.grad_checkpointing:
        return
    if not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(f"--grad-checkpointing: {args.model} has no such thing. Leave it out.")
    model.set_grad_checkpointing(on)


def make_images(args: argparse.Namespace, count: int, device: torch.device | None = None) -> Tensor:
    """Return black images (N, C, H, W) of the size that the flags say."""
    return torch.zeros(count, args.in_chans, args.img_size, args.img_size, device=device)


def make_supernet(args: argparse.Namespace, model: nn.Module | None = None) -> Supernet:
    """Convert the base model; if none is given, create it with fresh weights."""
    model = create_model(args) if model is None else model
    resolve_input(args, model)
    return convert(
        model, make_images(args, 2), freeze=args.freeze, min=args.min_width, divisor=args.divisor, choices=args.choices,
        **describe_base(args),
    )  # fmt: skip


def load_supernet(run: Path, args: argparse.Namespace) -> Supernet:
    """Make the run's supernet with its trained weights.

    Raises:
        ConfigError: the training has not finished.
    """
    if not (run / SUPERNET).is_file():
        raise ConfigError(f"{run} holds no {SUPERNET}: finish its training first: recipes/train.py --resume.")
    supernet = make_supernet(args)
    read_weights(run / SUPERNET, supernet.model)
    return supernet
