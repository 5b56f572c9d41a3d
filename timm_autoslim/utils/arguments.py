"""Check numbers that a user or a file gives."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch

from timm_autoslim.errors import AutoSlimError, ConfigError

_INT32 = 2**31 - 1


def is_int(value: object) -> TypeGuard[int]:
    """Return whether a value is a Python int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


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


def make_generator(seed: Any) -> torch.Generator:
    """Return a new generator of random numbers with this seed.

    Raises:
        ConfigError: the seed is no integer, or is out of range.
    """
    return torch.Generator().manual_seed(check_integer("seed", seed, ConfigError, -(2**63), 2**64 - 1))
