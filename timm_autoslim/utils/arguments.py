"""Arguments that several rooms check alike."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch

from timm_autoslim.errors import AutoSlimError, ConfigError


def as_integer(value: Any) -> int | None:
    """Return an integer of Python's, numpy's or another kind as Python's own; None for all else, booleans included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_integer(
    name: str, value: Any, error: type[AutoSlimError], least: int = 1, most: int = 2**31 - 1, also: str = ""
) -> int:
    """Return an argument as an int; numpy's integers are fine, and booleans are none.

    Args:
        name, value: the argument.
        error: what is raised.
        least, most: its range.
        also: what else the caller takes, for the message, such as " or None".

    Raises:
        AutoSlimError: of the type `error`: no integer, or out of range.
    """
    number = as_integer(value)
    if number is None or not least <= number <= most:
        kind = "a positive integer" if (least, most) == (1, 2**31 - 1) else f"an integer from {least} to {most}"
        raise error(f"got {name}={value!r}; needed: {kind}{also}")
    return number


def make_generator(seed: Any) -> torch.Generator:
    """Return a generator of random numbers of this seed; raise ConfigError if it is no seed."""
    return torch.Generator().manual_seed(check_integer("seed", seed, ConfigError, -(2**63), 2**64 - 1))


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
