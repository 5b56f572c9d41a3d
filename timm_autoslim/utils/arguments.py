"""Check arguments: numbers that a user or a file gives, and values of the wrong type."""

from __future__ import annotations

import operator
import os
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn

from timm_autoslim.errors import AutoSlimError, ConfigError

T = TypeVar("T")

_INT32 = 2**31 - 1


def is_int(value: object) -> TypeGuard[int]:
    """Return whether a value is a Python int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value is a real number; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_integer(value: Any) -> int | None:
    """Return an integer of any type, such as numpy's, as an int; None for every other value, and for booleans."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_integer(
    name: str, value: Any, error: type[AutoSlimError], least: int = 1, most: int = _INT32, also: str = ""
) -> int:
    """Return an argument as an int.

    Args:
        name: the argument's name, for the message.
        value: its value; integers of any type are fine, booleans are not.
        error: the type of the error.
        least: the smallest integer that is allowed.
        most: the largest one.
        also: what else the caller accepts, for the message, such as " or None".

    Raises:
        AutoSlimError: of the type `error`: the value is no integer, or is out of range.
    """
    number = as_integer(value)
    if number is None or not least <= number <= most:
        kind = "a positive integer" if (least, most) == (1, _INT32) else f"an integer from {least} to {most}"
        raise error.at(name, got=repr(value), needed=f"{kind}{also}")
    return number


def check_share(name: str, value: Any, error: type[AutoSlimError], needed: str) -> float:
    """Return an argument as a float if it is a number from 0 to 1.

    Raises:
        AutoSlimError: of the type `error`: it is no number, or is out of range.
    """
    if not is_number(value) or not 0 <= float(value) <= 1:
        raise error.at(name, got=quote(value), needed=needed)
    return float(value)


def check_positive(name: str, value: Any, error: type[AutoSlimError]) -> float:
    """Return an argument as a float if it is a number above 0.

    Raises:
        AutoSlimError: of the type `error`: it is no number, or not above 0.
    """
    if not is_number(value) or not 0 < float(value) < float("inf"):
        raise error.at(name, got=quote(value), needed="a number above 0")
    return float(value)


def check_type(name: str, value: Any, kind: type[T], error: type[AutoSlimError], needed: str) -> T:
    """Return an argument of this type.

    Raises:
        AutoSlimError: of the type `error`: it is of another type.
    """
    if not isinstance(value, kind):
        raise error.at(name, got=quote(value), needed=needed)
    return value


def check_flag(name: str, value: Any, error: type[AutoSlimError] = ConfigError) -> bool:
    """Return an argument that is True or False.

    Raises:
        AutoSlimError: of the type `error`: it is neither.
    """
    return check_type(name, value, bool, error, "True or False")


def check_module(name: str, value: Any, error: type[AutoSlimError] = ConfigError) -> nn.Module:
    """Return an argument that is a module.

    Raises:
        AutoSlimError: of the type `error`: it is none.
    """
    return check_type(name, value, nn.Module, error, "an nn.Module")


def check_callable(name: str, value: Any, error: type[AutoSlimError], needed: str) -> None:
    """Make sure that an argument can be called; `needed` says with what.

    Raises:
        AutoSlimError: of the type `error`: it cannot.
    """
    if not callable(value):
        raise error.at(name, got=quote(value), needed=needed)


def check_dtype(value: Any, error: type[AutoSlimError]) -> None:
    """Make sure that `dtype` is a floating point type, or None.

    Raises:
        AutoSlimError: of the type `error`: it is neither.
    """
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise error.at("dtype", got=repr(value), needed="a floating point type, such as torch.float16, or None")


def check_path(name: str, value: Any, error: type[AutoSlimError]) -> Path:
    """Return an argument as a path.

    Raises:
        AutoSlimError: of the type `error`: it is neither a text nor a path.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise error.at(name, got=quote(value), needed="a path, as a str or a pathlib.Path")
    return Path(value)


def check_texts(name: str, value: Any, error: type[AutoSlimError], needed: str) -> list[str]:
    """Return an argument as a list of texts: one text, or several.

    Raises:
        AutoSlimError: of the type `error`: it is neither a text nor a sequence of texts.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(text, str) for text in value):
        raise error.at(name, got=quote(value), needed=needed)
    return list(value)


def quote(value: object) -> str:
    """Return a value as a message shows it: short ones in full, of others the type."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text and " at 0x" not in text else f"a {type(value).__name__}"


def make_generator(seed: Any) -> torch.Generator:
    """Return a new generator of random numbers with this seed.

    Raises:
        ConfigError: the seed is no integer, or is out of range.
    """
    return torch.Generator().manual_seed(check_integer("seed", seed, ConfigError, -(2**63), 2**64 - 1))
