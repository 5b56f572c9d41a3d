"""Another model as the teacher: --teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from timm_autoslim import create_base
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.models import describe_input, fit_channels, load_supernet, make_images
from timm_autoslim.recipes.lib.run_folder import SUPERNET, read_args
from timm_autoslim.recipes.lib.starting_points import create_starting_model, is_trained


class Teacher(nn.Module):
    """A frozen model that takes the student's images, and normalises them as it was trained."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        super().__init__()
        self.model = model
        data = resolve_data_config({}, model=model)
        normalisation = [fit_channels(data[key], args.in_chans) for key in ("mean", "std")]
        self.same = normalisation == [list(args.mean), list(args.std)]
        student_mean, student_std, mean, std = (
            torch.tensor(values).view(-1, 1, 1) for values in (args.mean, args.std, *normalisation)
        )  # (C, 1, 1)
        self.register_buffer("scale", student_std / std)
        self.register_buffer("shift", (student_mean - mean) / std)
        self.eval().requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (N, classes) of inputs (N, C, H, W) that are normalised for the student."""
        logits: Tensor = self.model(inputs if self.same else inputs * self.scale + self.shift)
        return logits


ORIGINAL, NONE = "original", "none"  # of --teacher


def choose_teacher(args: argparse.Namespace) -> str | None:
    """Return the --teacher of a fine-tuning, or None; if none is given, the original where it knows these classes.

    Args:
        args: the flags of the fine-tuning, and of its run's training.
    """
    if args.teacher:
        return None if args.teacher == NONE else str(args.teacher)
    return ORIGINAL if is_trained(args) else None


def check_unlabelled(args: argparse.Namespace) -> None:
    """Refuse images without labels where nothing says what they show.

    Raises:
        ConfigError: there is no teacher, or its loss has no share; or images are mixed with each other by their labels.
    """
    if not args.unlabelled:
        return
    if args.teacher == NONE or not args.teach or not args.epochs:
        raise ConfigError("--unlabelled needs a --teacher, --teach above 0 and --epochs: else nobody labels them.")
    if args.mixup or args.cutmix:
        raise ConfigError(
            "--unlabelled: --mixup and --cutmix mix labels, which these images do not have. Leave them out."
        )


def create_teacher(args: argparse.Namespace) -> Teacher:
    """Create --teacher with its trained weights; `args` describe the student, whose input is resolved already.

    Raises:
        ConfigError: it cannot be created, has no weights, or does not take the images or have the classes.
    """
    image = make_images(args, 1)  # (1, C, H, W)
    try:
        teacher = Teacher(_create_model(args), args)
        with torch.no_grad():
            logits = teacher(image)
    except Exception as error:  # a model may raise anything, from its constructor, its download or its forward
        raise ConfigError(
            f"--teacher {args.teacher} gives no logits of images {tuple(image.shape[1:])}: {error}. Name a timm model "
            "that has pretrained weights, or a folder that timm loads; --teacher-kwargs may help."
        ) from error
    if logits.shape != (1, args.num_classes):
        raise ConfigError(
            f"--teacher {args.teacher} has outputs {tuple(logits.shape[1:])}, but the data have {args.num_classes} "
            "classes: fine-tune it on these data first."
        )
    return teacher


def _create_model(args: argparse.Namespace) -> nn.Module:
    """Create a teacher from what --teacher may be: the original, a run folder, weights of the base, or a name."""
    path = Path(args.teacher)
    if (path / SUPERNET).is_file():
        model: nn.Module = load_supernet(path, read_args(path, argparse.Namespace(data_dir=None))).model
    elif args.teacher == ORIGINAL:
        model = create_starting_model(argparse.Namespace(**vars(args)))
    elif path.is_file():
        model = create_starting_model(argparse.Namespace(**vars(args) | {"initial_checkpoint": args.teacher}))
    else:
        name = f"local-dir:{args.teacher}" if path.is_dir() else args.teacher
        if name.startswith("torchvision/"):
            return create_base(name, weights="DEFAULT", **args.teacher_kwargs)
        named: nn.Module = timm.create_model(
            name, pretrained=True, **{"in_chans": args.in_chans, **args.teacher_kwargs}
        )
        return named
    describe_input(model, args)  # its images are those of the student
    return model
