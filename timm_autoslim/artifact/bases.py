"""The models that recipes start from: timm's by name, torchvision's dressed as timm models."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import timm
from torch import nn

from timm_autoslim.artifact.construct import ARCHITECTURE, TORCHVISION, construct, hollow
from timm_autoslim.artifact.torchvision import create_torchvision, describe_features
from timm_autoslim.errors import ArtifactError


def create_base(name: str, /, **kwargs: Any) -> nn.Module:
    """Create the model that a recipe starts from, with random weights.

    Args:
        name: a timm model name (`resnet50`, `resnet50.a1_in1k`), or `torchvision/NAME` with a torchvision
            classification builder (`torchvision/resnet18`) or class (`torchvision/MNASNet`).
        **kwargs: arguments of its constructor. `num_classes` (0 for no head) and `in_chans` work for both. Weights
            are loaded only if these arguments say so (`pretrained=True`, or torchvision's `weights=`).

    Returns:
        The model. A torchvision model also carries what timm expects of one: `num_classes`, `num_features`,
        `head_hidden_size`, `feature_info` and `pretrained_cfg`.

    Raises:
        ArtifactError: the name is unknown, or the constructor refuses the arguments.

    Example:
        >>> model = create_base("torchvision/squeezenet1_1", num_classes=10)
        >>> model.num_classes, model.pretrained_cfg["input_size"]
        (10, (3, 224, 224))
    """
    model = create_raw(name, **kwargs)
    if name.startswith(TORCHVISION):
        describe_features(model)
    return model


def create_hollow(name: str, /, **kwargs: Any) -> nn.Module:
    """As `create_base`, but without data where that works."""
    return hollow(create_base, name, **kwargs)


def create_raw(name: str, /, **kwargs: Any) -> nn.Module:
    """As `create_base`, but leaves it to the caller to `describe_features` of a torchvision model."""
    if name.startswith(TORCHVISION):
        return create_torchvision(name.removeprefix(TORCHVISION), kwargs)
    arch = name.partition(".")[0]
    if arch == ARCHITECTURE or not arch.isidentifier() or not timm.is_model(arch):
        raise ArtifactError(
            f"base {reprlib.repr(name)} is unknown: needed a name of timm.list_models(), or 'torchvision/NAME' with a "
            "torchvision builder or class; pass base= with such a name, or update timm"
        )
    model: nn.Module = construct(timm.create_model, name, name, **kwargs)
    return model


class _Noted(BaseException):
    """Ends an entrypoint where it would build its model."""


def find_filter(name: str, /, **kwargs: Any) -> Callable[..., Any] | None:
    """Return timm's function that fits weights to a base: what its entrypoint hands to timm's builder.

    The entrypoint runs on a copy of its module's names, in which the builder only notes the function. timm's own
    modules stay as they are, for other threads too.

    Args:
        name: as in `create_base`.
        **kwargs: arguments of the constructor.

    Returns:
        A function of a state dict and a model that returns a state dict; None where the base has none.
    """
    if name.startswith(TORCHVISION):
        return None
    entrypoint: Any = timm.models.model_entrypoint(name)
    found: list[Callable[..., Any] | None] = []

    def note(*_: Any, pretrained_filter_fn: Callable[..., Any] | None = None, **__: Any) -> None:
        found.append(pretrained_filter_fn)
        raise _Noted

    theirs = vars(sys.modules[entrypoint.__module__])
    names = dict(theirs)
    for key, value in theirs.items():
        if isinstance(value, FunctionType) and value.__globals__ is theirs:
            names[key] = FunctionType(value.__code__, names, key, value.__defaults__, value.__closure__)
            names[key].__kwdefaults__ = value.__kwdefaults__
    names["build_model_with_cfg"] = note
    try:
        construct(names.get(entrypoint.__name__, entrypoint), name, **kwargs)
    except _Noted:
        return found[0]
    return None
