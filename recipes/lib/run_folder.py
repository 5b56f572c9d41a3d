"""The files of a run folder that several recipes read or write: flags, weights, JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from timm_autoslim import files
from timm_autoslim.errors import ConfigError

# Flags that every version of train.py wrote and the other recipes read; and those that came later, with what earlier
# versions did.
_OLDEST = {"model", "data_dir"}
_ADDED = {"crop_mode": "center"}
SUPERNET = "supernet.safetensors"  # only a training that is finished writes it


def write_json(path: Path, content: object) -> None:
    """Write a JSON file in full or not at all."""
    files.write_text(path, json.dumps(content, indent=2) + "\n")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters and buffers as safetensors, in full or not at all."""
    with files.replace_file(path) as part:
        save_model(model, str(part))


def read_weights(path: Path, model: nn.Module) -> None:
    """Load what `write_weights` wrote, strictly."""
    load_weights(model, load_file(path))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights by name, strictly; of tensors that are tied in the model, one is enough.

    Files of safetensors and ordinary dicts lack the versions of a state dict, without which torchvision's MNASNet loads
    nothing.
    """
    needed: Any = model.state_dict()
    state: Any = OrderedDict(weights)
    by_place = {_find_place(tensor): weights[name] for name, tensor in needed.items() if name in weights}
    for name, tensor in needed.items():
        if name not in state and tensor.data_ptr() and _find_place(tensor) in by_place:
            state[name] = by_place[_find_place(tensor)]
    state._metadata = needed._metadata
    model.load_state_dict(state)


def _find_place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def write_args(folder: Path, args: argparse.Namespace) -> None:
    """Write the flags of a training to its args.yaml."""
    files.write_text(folder / "args.yaml", yaml.safe_dump(vars(args), sort_keys=False))


def read_args(run: Path, args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags of the run's train.py, overridden by those of another recipe.

    Raises:
        ConfigError: the folder holds no training, or its args.yaml no flags.
    """
    path = run / "args.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is not a run folder: it holds no args.yaml. Train first: recipes/train.py.")
    of_training = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(of_training, dict) or not of_training.keys() >= _OLDEST:
        needed = f"the flags of a training, with {', '.join(sorted(_OLDEST))}"
        remedy = "it is damaged, or of another version: train again in another folder"
        raise ConfigError.at(str(path), got="no such flags", needed=needed, remedy=remedy)
    flags = _ADDED | of_training | vars(args)
    return argparse.Namespace(**flags | {"data_dir": args.data_dir or of_training["data_dir"]})
