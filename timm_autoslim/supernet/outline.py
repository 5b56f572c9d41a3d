"""What a model looked like when it was converted, and what has changed since: slices and costs count on it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.errors import ModelChangedError
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.utils.tensors import find_tied_names

_MENTIONED = 3  # so many changes are named
_ABSENT = object()


class Outline:
    """Names, shapes and numbers of a model when it was converted.

    It has what slices and costs follow from: the shapes of all parameters, and of buffers and tensor attributes that
    are sliced; which parameters are tied; attributes that change with the widths; hyperparameters of torch's modules,
    such as a stride; and attributes that are lists of integers, such as the size of the images. Values, types, devices,
    hooks, and modules that have none of these may change.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, written: frozenset[str] = frozenset()) -> None:
        """Draw the outline of a model.

        Args:
            model: it is as it was when it was traced into `graph`.
            graph: its channel graph.
            written: paths of attributes that the model's own forward changes.
        """
        self._sliced = tuple(name for name in {name for name, _ in graph.lengths} if name not in graph.parameters)
        self._shapes = _read_shapes(model, self._sliced)
        self._ties = _find_ties(model)
        attributes = {path: _find_attribute(model, path) for path in graph.attributes}
        self._attributes = {p: v for p, v in attributes.items() if v is not _ABSENT and not isinstance(v, Tensor)}
        self._numbers = {path: value for path, value in _list_numbers(model) if path not in written}
        self._snapshot: _Snapshot | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_snapshot": None}  # it holds parts of this model, and not of a copy

    def check(self, model: nn.Module, *, numbers: bool = True) -> None:
        """Make sure that the model is as it was.

        Args:
            model: the model as it is now.
            numbers: look at hyperparameters and sizes too. Costs follow from them; slices do not.

        Raises:
            ModelChangedError: it has changed; the text says what.
        """
        if torch.compiler.is_compiling():  # the compiler itself guards shapes
            return
        if self._snapshot is not None and self._snapshot.holds(model, numbers):
            return
        changes = list(self._list_changes(model))
        if not changes:
            if not getattr(model, "_is_replica", False):  # of DataParallel, for one call
                self._snapshot = _Snapshot(model, list(self._attributes), list(self._numbers))
            return
        more = f" and {len(changes) - _MENTIONED} more" if len(changes) > _MENTIONED else ""
        raise ModelChangedError.at(
            "the model",
            got=f"changes since it was converted ({'; '.join(changes[:_MENTIONED])}{more})",
            needed="the model that was converted: widths, slices and costs are of that one",
            remedy="convert it again",
        )

    def _list_changes(self, model: nn.Module) -> Iterator[str]:
        """Yield what has changed, in words."""
        shapes, ties = _read_shapes(model, self._sliced), _find_ties(model)
        for name in (*self._shapes, *(shapes.keys() - self._shapes.keys())):
            now, before = shapes.get(name), self._shapes.get(name)
            if now != before:
                yield f"{name} {_describe(now, before)}"
        for name in (*self._ties, *(ties.keys() - self._ties.keys())):
            tie, before_tie = ties.get(name), self._ties.get(name)
            if tie != before_tie and name in shapes:
                yield f"{name} is {_describe_tie(tie)}, and was {_describe_tie(before_tie)}"
        for path, value in (self._attributes | self._numbers).items():
            number = _find_attribute(model, path)
            if number != value:
                yield f"{path} is {'gone' if number is _ABSENT else number}, and was {value}"


class _Snapshot:
    """The dicts in a model that hold its parameters, modules and numbers, and what they held.

    As long as they hold the same, nothing needs a closer look. It takes a few microseconds to see.
    """

    def __init__(self, model: nn.Module, attributes: list[str], numbers: list[str]) -> None:
        self._model = model
        modules = [module.__dict__ for module in model.modules()]
        stores = [(module["_parameters"], module["_modules"]) for module in modules]
        self._parameters = [parameters for parameters, _ in stores if parameters]
        self._children = [children for _, children in stores if children]
        self._empty = [store for pair in stores for store in pair if not store]
        self._modules = [*chain.from_iterable(map(dict.values, self._children))]
        self._tensors = self._read_tensors()
        self._attributes = [_find_entry(model, path) for path in attributes]
        self._numbers = [_find_entry(model, path) for path in numbers]
        self._values = [[store.get(key) for store, key in self._attributes], self._read_numbers()]

    def holds(self, model: nn.Module, numbers: bool) -> bool:
        """Whether all is the same."""
        return (
            model is self._model
            and not any(self._empty)
            and sum(map(len, self._children)) == len(self._modules)
            and all(map(is_, chain.from_iterable(map(dict.values, self._children)), self._modules))
            and self._read_tensors() == self._tensors
            and [store.get(key) for store, key in self._attributes] == self._values[0]
            and (not numbers or self._read_numbers() == self._values[1])
        )

    def _read_tensors(self) -> tuple[list[torch.Size], int]:
        """Return the shapes of the parameters, and how many different ones there are."""
        tensors = [t for t in chain.from_iterable(map(dict.values, self._parameters)) if t is not None]
        return [*map(attrgetter("shape"), tensors)], len({*map(id, tensors)})

    def _read_numbers(self) -> list[Any]:
        """Return the other numbers; a list may be changed in place."""
        values = (store.get(key) for store, key in self._numbers)
        return [tuple(value) if type(value) is list else value for value in values]


def _read_shapes(model: nn.Module, sliced: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, and of the sliced buffers and tensor attributes, by all of their names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        # a replica of DataParallel has its parameters elsewhere
        parameters = getattr(module, "_former_parameters", None) or module._parameters
        for leaf, tensor in parameters.items():
            if tensor is not None:
                shapes[f"{path}.{leaf}" if path else leaf] = tuple(tensor.shape)
    for name in sliced:
        path, _, leaf = name.rpartition(".")
        module = _find_module(model, path.split(".") if path else [])
        for store in () if module is None else (module._buffers, module.__dict__):
            tensor = store.get(leaf)
            if isinstance(tensor, Tensor):
                shapes[name] = tuple(tensor.shape)
    return shapes


def _find_ties(model: nn.Module) -> dict[str, str]:
    """Return, for each further name of a tied parameter, its first name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: first for name, first in find_tied_names(model).items() if name in parameters}


def _find_module(model: nn.Module, parts: list[str]) -> nn.Module | None:
    module: nn.Module | None = model
    for part in parts:
        module = None if module is None else module._modules.get(part)
    return module


def _find_entry(model: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """Return the dict that holds an attribute, and its key there; an empty dict if nothing has this path."""
    *parts, leaf = path.split(".")
    module = _find_module(model, parts)
    return ({} if module is None else module.__dict__), leaf


def _find_attribute(model: nn.Module, path: str) -> Any:
    """Return a module's own attribute, a list as a tuple; `_ABSENT` if there is none, or it is inside of another."""
    store, key = _find_entry(model, path)
    value = store.get(key, _ABSENT)
    return tuple(value) if type(value) is list else value


def _list_numbers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the hyperparameters of modules that are integers, and all attributes that are lists of integers."""
    for path, module in model.named_modules():
        constants = getattr(type(module), "__constants__", ())  # torch's modules name theirs so
        for name, value in module.__dict__.items():
            is_list = type(value) in (tuple, list) and value and all(type(item) is int for item in value)
            if not name.startswith("_") and (is_list or (type(value) is int and name in constants)):
                yield f"{path}.{name}" if path else name, tuple(value) if is_list else value


def _describe(now: tuple[int, ...] | None, before: tuple[int, ...] | None) -> str:
    if now is None:
        return "is gone"
    return f"has the shape {now}, and had {before}" if before is not None else f"is new, of the shape {now}"


def _describe_tie(name: str | None) -> str:
    return "not tied" if name is None else f"tied to {name}"
