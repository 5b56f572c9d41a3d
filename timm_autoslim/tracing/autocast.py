"""Autocast on the meta device: torch refuses it, and models ask for it by `torch.autocast(x.device.type)`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from timm_autoslim.utils.restoring import restoring

_FUNCTIONS = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype")


@contextlib.contextmanager
def accept_autocast_on_meta() -> Iterator[None]:
    """Let code in the block ask for autocast of the meta device, as of a CPU: it changes nothing there.

    One thread at a time may open such a block.

    Example:
        >>> with accept_autocast_on_meta(), torch.autocast("meta", enabled=False):
        ...     torch.is_autocast_enabled("meta")
        False
    """
    originals = (torch.autocast.__init__, *(getattr(torch, name) for name in _FUNCTIONS))
    with restoring(lambda: _install(*originals)):
        _install(*map(_as_on_cpu, originals))
        yield


def _install(constructor: Any, *functions: Any) -> None:
    torch.autocast.__init__ = constructor  # type: ignore[method-assign]
    for name, function in zip(_FUNCTIONS, functions, strict=True):
        setattr(torch, name, function)


def _as_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gets "cpu" where somebody passes "meta"."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if isinstance(arg, str) and arg == "meta" else arg for arg in args)
        if kwargs.get("device_type") == "meta":
            kwargs["device_type"] = "cpu"
        return function(*args, **kwargs)

    return call
