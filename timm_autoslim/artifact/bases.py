"""The models that specs start from: timm's by name, and torchvision's described as timm describes its own."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

from timm_autoslim.artifact.spec import ARCHITECTURE, TORCHVISION
from timm_autoslim.artifact.torchvision import construct_torchvision, describe_features
from timm_autoslim.errors import ArgumentError, ArtifactError, AutoSlimError
from timm_autoslim.utils.arguments import check_type


def create_base(name: str, /, **kwargs: Any) -> nn.Module:
    """Create a base with random weights.

    Args:
        name: a timm model name (`resnet50`, `resnet50.a1_in1k`), or `torchvision/NAME` with a torchvision
            classification builder (`torchvision/resnet18`) or class (`torchvision/MNASNet`).
        **kwargs: arguments of its constructor. `num_classes` (0 for no head) and `in_chans` work for both. Weights
            are loaded only if these arguments say so (`pretrained=True`, or torchvision's `weights=`).

    Returns:
        The model. A torchvision model also has what timm expects of one: `num_classes`, `num_features`,
        `head_hidden_size`, `feature_info` and `pretrained_cfg`.

    Raises:
        ArtifactError: the name is unknown, or the constructor refuses the arguments.

    Example:
        >>> model = create_base("torchvision/squeezenet1_1", num_classes=10)
        >>> model.num_classes, model.pretrained_cfg["input_size"]
        (10, (3, 224, 224))
    """
    model = construct_base(name, **kwargs)
    if name.startswith(TORCHVISION):
        describe_features(model)
    return model


def create_meta_base(name: str, /, **kwargs: Any) -> nn.Module:
    """Create a base on the meta device, without data; its arguments are those of `create_base`.

    A constructor that reads values cannot run there, and then the model has data.

    Raises:
        ArtifactError: as `create_base`.

    Example:
        >>> model = create_meta_base("resnet10t")
        >>> model.conv1[0].weight.device
        device(type='meta')
    """
    return build_on_meta(create_base, name, **kwargs)


def construct_base(name: str, /, **kwargs: Any) -> nn.Module:
    """Create a base as `create_base` does, but leave it to the caller to `describe_features` of a torchvision model.

    Raises:
        ArtifactError: as `create_base` does.
    """
    check_type("base", name, str, ArtifactError, "a timm model name, or 'torchvision/NAME'")
    if name.startswith(TORCHVISION):
        model: nn.Module = call_base(name, construct_torchvision, name.removeprefix(TORCHVISION), **kwargs)
        return model
    arch = name.partition(".")[0]
    if arch == ARCHITECTURE or not arch.isidentifier() or not timm.is_model(arch):
        raise ArtifactError.at(
            "base",
            got=f"{reprlib.repr(name)}, which is unknown",
            needed="a name of timm.list_models(), or 'torchvision/NAME' with a torchvision builder or class",
            remedy="pass base= with such a name, or update timm",
        )
    model = call_base(name, timm.create_model, name, **kwargs)
    return model


def get_base_settings(base: str) -> PretrainedCfg:
    """Return timm's data settings of a base, without a place to load weights from: these do not fit a slim model."""
    cfg = None if base.startswith(TORCHVISION) else call_base(base, get_pretrained_cfg, base)
    settings = (cfg or PretrainedCfg()).to_dict(remove_source=True)
    unused = ("architecture", "custom_load", "label_offset")
    return PretrainedCfg(**{key: value for key, value in settings.items() if key not in unused})


def call_base(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a constructor or a method of the base `name`; whatever it raises becomes an `ArtifactError`.

    A TypeError stays one: programs catch it where they try an argument that not every model takes.
    """
    try:
        return function(*args, **kwargs)
    except AutoSlimError:
        raise
    except Exception as error:  # a constructor may raise anything at all on arguments that it does not expect
        text = str(error) if len(str(error)) <= 500 else f"{str(error)[:500]}..."
        raise (ArgumentError if isinstance(error, TypeError) else ArtifactError)(
            f"base {name!r}: cannot be created with {reprlib.repr(kwargs)}: {type(error).__name__}: {text}; "
            "change base_args= or the keyword arguments of create_model"
        ) from error


def build_on_meta(function: Callable[..., nn.Module], /, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a model on the meta device, without data; or with data where its constructor reads values."""
    try:
        with torch.device("meta"):
            return function(*args, **kwargs)
    except ArtifactError:
        return function(*args, **kwargs)


# ------------------------------------------------------------------------------------------------ weights of a base


class _BuilderReached(BaseException):
    """Ends an entrypoint where it would build its model."""


def find_weight_filter(name: str, /, **kwargs: Any) -> Callable[..., Any] | None:
    """Return timm's function that fits weights to a base: what its entrypoint passes to timm's builder.

    The entrypoint runs on a copy of its module's names, in which the builder is replaced. timm's own modules stay as
    they are, for other threads too.

    Args:
        name: as in `create_base`.
        **kwargs: arguments of the constructor.

    Returns:
        A function of a state dict and a model that returns a state dict; None where the base has none.
    """
    if name.startswith(TORCHVISION):
        return None
    entrypoint: Any = timm.models.model_entrypoint(name)
    filters: list[Callable[..., Any] | None] = []

    def build_model_with_cfg(*_: Any, pretrained_filter_fn: Callable[..., Any] | None = None, **__: Any) -> None:
        filters.append(pretrained_filter_fn)
        raise _BuilderReached

    originals = vars(sys.modules[entrypoint.__module__])
    names = dict(originals)
    for key, value in originals.items():
        if isinstance(value, FunctionType) and value.__globals__ is originals:
            names[key] = FunctionType(value.__code__, names, key, value.__defaults__, value.__closure__)
            names[key].__kwdefaults__ = value.__kwdefaults__
    names["build_model_with_cfg"] = build_model_with_cfg
    try:
        call_base(name, names.get(entrypoint.__name__, entrypoint), **kwargs)
    except _BuilderReached:
        return filters[0]
    return None
