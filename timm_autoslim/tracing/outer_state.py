"""What the code of a model keeps outside of the model: on classes, in Python's modules, in closures and in caches.

A run on the meta device must not leave meta tensors there, and what earlier runs left there must not change what it
finds. So such state is noted before the run and put back after it, caches start empty, functions with an `lru_cache`
get another one for the run, those of `math` pass the origins of sizes on, and generators of random numbers start from
the same seed in every run.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_autoslim.tracing.autocast import accept_autocast_on_meta
from timm_autoslim.tracing.functions import FUNCTIONS, HOMES
from timm_autoslim.tracing.holdings import list_attributes
from timm_autoslim.tracing.reachable import CONTAINERS, MISSING, Binding, Container, Walk
from timm_autoslim.tracing.sizes import Size
from timm_autoslim.utils.codes import LRU_CACHED
from timm_autoslim.utils.meta import sharing_generators
from timm_autoslim.utils.tensors import list_leaves

T = TypeVar("T")
_TRACING = threading.RLock()


def with_empty_caches(model: nn.Module, action: Callable[[OuterState], T]) -> T:
    """Return what `action` returns, and put all state back that the code of `model` keeps outside of it.

    Args:
        model: the code of its modules says which state there is.
        action: it runs meta copies of the model. The caches are empty when it starts, and it gets the state, which
            empties them again, and those in the modules of a copy. It is called again if something that was emptied is
            no cache, because no run filled it.
    """
    with _TRACING:  # or the state that one thread notes would be what another one has put there
        return _run(OuterState(model), action)


def _run(state: OuterState, action: Callable[[OuterState], T]) -> T:
    try:
        while True:
            state.empty_caches()
            try:
                with sharing_generators(state.generators), accept_autocast_on_meta():
                    result = action(state)
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
        for attribute in list_attributes(model):  # functions that modules hold are the same in copies of the model
            if isinstance(attribute.owner, types.FunctionType):
                value = attribute.read()
                self._places.append(Binding(attribute.store, attribute.key, value))
                self._containers += [Container(value)] if type(value) in CONTAINERS else []
        modules = [Binding(vars(m), n, v) for m in model.modules() for n, v in vars(m).items() if _is_cached(v)]
        self._cached = [*modules, *(place for place in self._places if _is_cached(place.value))]
        homes = [Binding(vars(home), n, f) for home in HOMES for n, f in vars(home).items() if _is_function(f)]
        self._functions = [*homes, *(place for place in self._places if _is_function(place.value))]
        self._cached_members = [c for c in self._containers if any(map(_is_cached, c.list_members()))]
        self.generators = walk.list_generators()
        self._written = walk.find_written_names()
        self._caches: list[Binding | Container] = [*walk.list_caches(self._written)]
        self._constants: set[str] = set()  # dicts of modules that are no caches
        self._dicts: dict[str, Container] = {}  # by path, the dicts of the modules of a copy that were emptied

    def empty_caches(self, meta_copy: nn.Module | None = None) -> None:
        """Put everything back, then empty the caches, and those in the modules of a copy too."""
        self.restore()
        if meta_copy is not None:
            self._dicts = dict(self._list_dicts(meta_copy))
            for container in self._dicts.values():
                container.empty()
        for cache in self._caches:
            cache.empty() if isinstance(cache, Container) else cache.write(None)
        for place in self._functions:
            place.write(FUNCTIONS[place.value])
        results: dict[Any, Any] = {}
        for place in self._cached:
            place.write(_bypass(place.value, results))
        for container in self._cached_members:
            container.replace(lambda member: _bypass(member, results))

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
            if type(module).__module__.startswith("torch.nn."):
                continue
            for name, value in _list_members(module):
                leaf = name.rpartition(".")[2]
                if isinstance(value, dict) and leaf in self._written and f"{path}.{name}" not in self._constants:
                    container = Container(value)
                    if container.has_size_keys():
                        yield f"{path}.{name}", container

    def has_numbers(self) -> bool:
        """Whether the model's code has written a number, or what holds one, that is no cache with sizes as keys."""
        replaced = {id(place) for place in (*self._cached, *self._functions)}
        places = [place for place in self._places if id(place) not in replaced]
        values = [value for place in places if (value := place.read()) is not place.value]
        for holder, names in self._namespaces:
            store = vars(holder) if isinstance(holder, type) else holder
            values += [store[name] for name in [*store] if name not in names and not name.startswith("__")]
        return any(map(_is_number, values)) or any(map(Container.has_other_numbers, self._containers))

    def restore(self) -> None:
        """Put everything back."""
        for place in (*self._places, *self._cached, *self._functions):
            place.restore()
        for container in self._containers:
            container.restore()
        for holder, names in self._namespaces:
            for name in [*(vars(holder) if isinstance(holder, type) else holder)]:
                if name not in names and not name.startswith("__"):
                    Binding(holder, name, MISSING).restore()


def _list_members(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module, and those of the objects that it holds."""
    for name, value in vars(module).items():
        yield name, value
        if not isinstance(value, (nn.Module, Tensor, type)):
            for inner, member in getattr(value, "__dict__", {}).items() if not callable(value) else ():
                yield f"{name}.{inner}", member


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_function(value: Any) -> bool:
    """Whether something takes the place of a function in a run."""
    return isinstance(value, types.BuiltinFunctionType) and value in FUNCTIONS


def _is_cached(value: Any) -> bool:
    """Whether a value is a function with an `lru_cache`, or a static method or partial of one."""
    if isinstance(value, (staticmethod, types.MethodType)):
        return _is_cached(value.__func__)
    return _is_cached(value.func) if isinstance(value, functools.partial) else type(value) is LRU_CACHED


def _bypass(value: Any, results: dict[Any, Any]) -> Any:
    """Return what takes the place of a function with an `lru_cache` in a run: its results are kept in `results`."""
    if not _is_cached(value):
        return value
    if isinstance(value, staticmethod):
        return staticmethod(_bypass(value.__func__, results))
    if isinstance(value, types.MethodType):
        return types.MethodType(_bypass(value.__func__, results), value.__self__)
    if isinstance(value, functools.partial):
        return functools.partial(_bypass(value.func, results), *value.args, **value.keywords)
    return _bypass_function(value, results)


def _bypass_function(function: Any, results: dict[Any, Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _belongs_to_run((*args, *kwargs.values())):
            return function.__wrapped__(*args, **kwargs)
        key = id(function), args, tuple(kwargs.items())
        if key not in results:
            result = function.__wrapped__(*args, **kwargs)
            if _belongs_to_run((result,)):
                return result
            results[key] = result
        return results[key]

    call.__dict__.update(cache_info=function.cache_info, cache_clear=function.cache_clear)
    return call


def _belongs_to_run(values: Iterable[Any]) -> bool:
    for value in list_leaves([*values]):
        if isinstance(value, (Size, nn.Module)) or (isinstance(value, Tensor) and value.is_meta):
            return True
        if isinstance(value, torch.device) and value.type == "meta":
            return True
    return False
