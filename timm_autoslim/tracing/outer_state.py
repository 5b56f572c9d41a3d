"""What the code of a model keeps outside of the model: on classes, in Python's modules, in closures and in caches.

A run on the meta device must not leave meta tensors there, and what earlier runs left there must not change what it
finds. So such state is noted before the run and put back after it, caches start empty, and functions with an
`lru_cache` bypass it where they are called with what belongs to the run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_autoslim.tracing.reachable import LRU_CACHED, MISSING, Container, Place, Walk
from timm_autoslim.tracing.sizes import Size

T = TypeVar("T")
EmptyCaches = Callable[[nn.Module | None], None]


def with_empty_caches(model: nn.Module, action: Callable[[EmptyCaches], T]) -> T:
    """Return what `action` returns, and put all state back that the code of `model` keeps outside of it.

    Args:
        model: the code of its modules says which state there is.
        action: it runs meta copies of the model. The caches are empty when it starts, and it gets a function that
            empties them again, and those in the modules of a copy. It is called again if something that was emptied is
            no cache, because no run filled it.
    """
    state = OuterState(model)
    try:
        while True:
            state.empty_caches()
            try:
                result = action(state.empty_caches)
            except Exception:
                if state.keep_constants(failed=True):
                    continue
                raise
            if not state.keep_constants():
                return result
    finally:
        state.restore()


class OuterState:
    """The state that the code of a model can reach by names, as it was at the start."""

    def __init__(self, model: nn.Module) -> None:
        walk = Walk()
        for module in model.modules():
            walk.add_module(module)
        walk.run()
        self._places, self._containers = list(walk.places.values()), list(walk.containers.values())
        self._namespaces = walk.namespaces
        self._cached = [place for place in self._places if type(_unwrap(place.value)) is LRU_CACHED]
        self._written = walk.find_written_names()
        self._caches: list[Place | Container] = [*walk.list_caches(self._written)]
        self._constants: set[str] = set()  # dicts of modules that are no caches
        self._dicts: dict[str, Container] = {}  # by path, the dicts of the modules of a copy that were emptied

    def empty_caches(self, meta_copy: nn.Module | None = None) -> None:
        """Put everything back, then empty the caches, and those in the modules of a copy too."""
        self.restore()
        self._dicts = {} if meta_copy is None else dict(self._list_dicts(meta_copy))
        for container in self._dicts.values():
            container.empty()
        for cache in self._caches:
            cache.empty() if isinstance(cache, Container) else cache.write(None)
        for place in self._cached:
            bypass = _bypass(_unwrap(place.value))
            place.write(staticmethod(bypass) if isinstance(place.value, staticmethod) else bypass)

    def keep_constants(self, failed: bool = False) -> bool:
        """Note which of the emptied caches the last run did not fill again: they are constants, and are not emptied.

        Args:
            failed: the run raised; if it had filled all caches again, none of them is emptied from now on.

        Returns:
            Whether there are any.
        """
        filled = [c for c in self._caches if (c.is_filled() if isinstance(c, Container) else c.read() is not None)]
        constants = {path for path, container in self._dicts.items() if not container.is_filled()}
        if failed and not constants and len(self._caches) == len(filled):
            filled, constants = [], set(self._dicts)
        before, self._caches = self._caches, filled
        self._constants |= constants
        return bool(constants) or len(self._caches) < len(before)

    def _list_dicts(self, model: nn.Module) -> Iterator[tuple[str, Container]]:
        """Yield the dicts in which modules keep sizes from one call to the next, by path."""
        for path, module in model.named_modules():
            for name, value in vars(module).items() if type(module).__module__[:9] != "torch.nn." else ():
                if isinstance(value, dict) and name in self._written and f"{path}.{name}" not in self._constants:
                    container = Container(value)
                    if container.has_size_keys():
                        yield f"{path}.{name}", container

    def restore(self) -> None:
        """Put everything back."""
        for place in self._places:
            place.restore()
        for container in self._containers:
            container.restore()
        for holder, names in self._namespaces:
            for name in [*(vars(holder) if isinstance(holder, type) else holder)]:
                if name not in names and not name.startswith("__"):
                    Place(holder, name, MISSING).restore()


def _unwrap(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod) else value


def _bypass(function: Any) -> Callable[..., Any]:
    """Return a function with an `lru_cache` that computes anew whatever belongs to a run on the meta device."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _belongs_to_run((*args, *kwargs.values())):
            return function.__wrapped__(*args, **kwargs)
        return function(*args, **kwargs)

    call.__dict__.update(cache_info=function.cache_info, cache_clear=function.cache_clear)
    return call


def _belongs_to_run(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, (Size, nn.Module)) or (isinstance(value, Tensor) and value.is_meta):
            return True
        if isinstance(value, torch.device) and value.type == "meta":
            return True
        if isinstance(value, (tuple, list)) and _belongs_to_run(value):
            return True
    return False
