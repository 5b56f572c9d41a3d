"""One way to name a model, for all commands: a timm name, torchvision/NAME, a folder, or a repository of the Hub."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from timm_autoslim import create_base
from timm_autoslim.errors import ArtifactError, ConfigError

TORCHVISION = "torchvision/"
STORED = ("local-dir:", "hf-hub:", "hf_hub:")  # models that say themselves what they are


def is_stored(name: str) -> bool:
    """Whether a name is that of a folder or of a repository of the Hub."""
    return name.startswith(STORED)


def resolve_name(name: str) -> str:
    """Return the full name of a model; a folder's becomes local-dir:FOLDER.

    Raises:
        ConfigError: it is unknown; the text names the nearest.
    """
    if is_stored(name):
        folder = Path(name.removeprefix("local-dir:"))
        if name.startswith("local-dir:") and not (folder / "config.json").is_file():
            raise ConfigError.at(
                "the model", got=f"{name!r}, which holds no config.json", needed="a folder that timm can load"
            )
        return name
    if (Path(name) / "config.json").is_file():
        return f"local-dir:{name}"
    exists = _is_torchvision(name.removeprefix(TORCHVISION)) if name.startswith(TORCHVISION) else _is_timm(name)
    if not exists:
        if Path(name).is_dir():
            networks = sorted(path.parent for path in Path(name).glob("exported/*/config.json"))
            needed = f"that of a network, such as {networks[0]}" if networks else "a folder that timm can load"
            raise ConfigError.at("the model", got=f"the folder {name}, which holds no config.json", needed=needed)
        near = [name for name in _list_near(name) if name]
        raise ConfigError.at(
            "the model",
            got=f"{name!r}, which is unknown",
            needed="a name of timm.list_models(), torchvision/NAME, local-dir:FOLDER or hf-hub:OWNER/NAME",
            remedy=f"did you mean {' or '.join(near)}?" if near else "",
        )
    return name


def _is_timm(name: str) -> bool:
    arch = name.partition(".")[0]
    if not timm.is_model(arch) or arch == "autoslim":
        return False
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # the tag is unknown
        return False
    return True


def _is_torchvision(name: str) -> bool:
    cls = getattr(torchvision.models, name, None)
    return name in _list_torchvision() or (inspect.isclass(cls) and issubclass(cls, nn.Module))


def _list_torchvision() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _list_near(name: str) -> list[str]:
    """Return the names that are most like one that is unknown: tags of an architecture, or architectures."""
    arch, _, tag = name.partition(".")
    if tag and timm.is_model(arch):
        return _find_near(name, timm.list_pretrained(f"{arch}.*")) or [arch]
    bare = name.removeprefix(TORCHVISION)
    vision = [f"{TORCHVISION}{near}" for near in _find_near(bare, _list_torchvision())]
    if name.startswith(TORCHVISION):
        return vision
    exact = [f"{TORCHVISION}{bare}"] if _is_torchvision(bare) else []
    return exact or _find_near(arch, timm.list_models()) or vision


def _find_near(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.7)


def create_named(name: str, /, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model by its full name, on the current default device.

    Args:
        name: what `resolve_name` returned.
        pretrained: with its weights: those of the tag, torchvision's default ones, or those of the folder.
        **kwargs: arguments of its constructor.

    Raises:
        ArtifactError: the constructor refuses the arguments.
        ConfigError: a folder or repository cannot be loaded.
    """
    if not is_stored(name):
        weights = {"weights": "DEFAULT"} if name.startswith(TORCHVISION) else {"pretrained": True}
        return create_base(name, **kwargs, **(weights if pretrained else {}))
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # of a folder that is damaged, or a repository that is not there
        raise ConfigError(f"{name} cannot be loaded with {kwargs}: {error}") from error
    return model


def create_meta(name: str, /, **kwargs: Any) -> nn.Module:
    """Create a model by its full name, on the meta device where its constructor can run there."""
    try:
        with torch.device("meta"):
            return create_named(name, **kwargs)
    except (ArtifactError, ConfigError):
        return create_named(name, **kwargs)


def read_data_settings(name: str, /, **kwargs: Any) -> dict[str, Any]:
    """Return what a model's configuration says of its images and classes, as timm has it.

    Args:
        name: what `resolve_name` returned.
        **kwargs: arguments of its constructor.
    """
    if is_stored(name) or name.startswith(TORCHVISION):
        settings: Any = create_meta(name, **kwargs).pretrained_cfg
        return dict(settings)
    config: Any = timm.get_pretrained_cfg(name)
    settings = {} if config is None else config.to_dict()
    return dict(settings)


def choose_size_args(name: str, side: int) -> dict[str, Any]:
    """Return the size of the images as an argument of the constructor, where a model is built for one and has another.

    Args:
        name: what `resolve_name` returned.
        side: height and width of the images.
    """
    if name.startswith(f"{TORCHVISION}vit_"):
        return {} if side == 224 else {"image_size": side}
    settings = {} if is_stored(name) or name.startswith(TORCHVISION) else read_data_settings(name)
    fixed = settings.get("fixed_input_size") and settings["input_size"][-1] != side
    return {"img_size": side} if fixed else {}
