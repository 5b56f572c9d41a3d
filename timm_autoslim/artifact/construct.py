"""Call the constructor of a base, with or without data."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from timm_autoslim.errors import ArgumentError, ArtifactError

ARCHITECTURE = "autoslim"
TORCHVISION = "torchvision/"


def hollow(function: Callable[..., nn.Module], /, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a model on the meta device, without data; some constructors read values, and then it has data."""
    try:
        with torch.device("meta"):
            return function(*args, **kwargs)
    except ArtifactError:
        return function(*args, **kwargs)


def construct(function: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a constructor or a method of the base `name`; whatever it raises becomes an `ArtifactError`.

    A TypeError stays one: programs catch it where they try an argument that not every model takes.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:  # a constructor may raise anything at all on arguments that it does not expect
        said = str(error) if len(str(error)) <= 500 else f"{str(error)[:500]}..."
        raise (ArgumentError if isinstance(error, TypeError) else ArtifactError)(
            f"base {name!r} cannot be created with {reprlib.repr(kwargs)}: {type(error).__name__}: {said}; "
            "change base_args= or the keyword arguments of create_model"
        ) from error
