"""The model of a supernet has to stay the one that was converted: slices and costs count on it."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn

from timm_autoslim.artifact.outline import Outline, find_entry, join_changes
from timm_autoslim.errors import ModelChangedError
from timm_autoslim.tracing.graph import ChannelGraph


class Guard:
    """Notices changes of a model since it was converted, by its outline of that time.

    It minds what slices and costs follow from: shapes, ties, attributes that change with the widths, hyperparameters
    such as a stride, and the size of the images. Values, types, devices, hooks, and modules that have none of these may
    change.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, written: frozenset[str] = frozenset()) -> None:
        """Draw the outline of a model.

        Args:
            model: it is as it was when it was traced into `graph`.
            graph: its channel graph.
            written: paths of attributes that the model's own forward changes.
        """
        self._outline = Outline.draw(model, {name for name, _ in graph.lengths}, graph.attributes, written)
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
        changes = list(self._outline.list_changes(model))
        if not changes:
            if not getattr(model, "_is_replica", False):  # of DataParallel, for one call
                self._snapshot = _Snapshot(model, list(self._outline.attributes), list(self._outline.numbers))
            return
        raise ModelChangedError.at(
            "the model",
            got=f"changes since it was converted ({join_changes(changes)})",
            needed="the model that was converted: widths, slices and costs are of that one",
            remedy="convert it again",
        )


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
        self._attributes = [find_entry(model, path) for path in attributes]
        self._numbers = [find_entry(model, path) for path in numbers]
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
