"""Autocast on the meta device: torch refuses it, and models ask for it by `torch.autocast(x.device.type)`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_LOCK = threading.Lock()
_FUNCTIONS = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype")


class _Blocks:
    """How many blocks are open in all threads, and what torch had before the first."""

    count = 0
    originals: tuple[Any, ...] = ()


@contextlib.contextmanager
def accept_autocast_on_meta() -> Iterator[None]:
    """Let code in the block ask for autocast of the meta device, as of a CPU: it changes nothing there.

    Example:
        >>> with accept_autocast_on_meta(), torch.autocast("meta", enabled=False):
        ...     torch.is_autocast_enabled("meta")
        False
    """
    with _LOCK:
        if not _Blocks.count:
            _Blocks.originals = (torch.autocast.__init__, *(getattr(torch, name) for name in _FUNCTIONS))
        try:
            _Blocks.count += 1
            _install(*map(_as_on_cpu, _Blocks.originals))
        except BaseException:  # an interrupt
            _leave()
            raise
    try:
        yield
    finally:
        with _LOCK:
            _leave()


def _leave() -> None:
    _Blocks.count -= 1
    if not _Blocks.count:
        _install(*_Blocks.originals)


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
