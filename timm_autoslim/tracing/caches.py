"""Tensors and numbers that a forward computes once and keeps, such as `if self._w is None: self._w = ...`.

A subnet gets what the widest has kept, so no width may decide it.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSet, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.tracing.holdings import Attribute, list_attributes, list_values
from timm_autoslim.tracing.record import Recorder
from timm_autoslim.tracing.writes import find_first_value, find_writes
from timm_autoslim.utils.meta import copy_to_meta

AttributeName = tuple[str, str]  # a module, and the name of what stands in it
Holdings = dict[AttributeName, Any]  # a tensor or number
_MOST_TRIES = 8


def list_holdings(model: nn.Module) -> Holdings:
    """Return the tensors and numbers that modules hold beside weights."""
    holdings: Holdings = {}
    for attribute in list_attributes(model):
        for place, value in list_values(attribute.read()):
            holdings[attribute.path, attribute.name + place] = value
    return holdings


def find_filled(before: Holdings, *later: Holdings) -> Holdings:
    """Return what runs have kept: it was not there before, and stayed to the end.

    Args:
        before: what the modules held before the runs.
        later: what they held after each run.
    """
    filled: Holdings = {}
    for place, value in later[-1].items():
        if value is not before.get(place):
            first = next(holdings[place] for holdings in later if place in holdings)
            if value is first and (isinstance(value, Tensor) or not _grows(place, later)):
                filled[place] = value
    return filled


def drop_memories(
    filled: Holdings, is_known: Callable[[Tensor], bool], make_copy: Callable[[], nn.Module], example: Any
) -> Holdings:
    """Return what runs have kept, without state: tensors of inputs in lists that each run changes, as last frames.

    Args:
        filled: what runs have kept.
        is_known: whether a tensor follows from weights and constants alone.
        make_copy: returns a meta copy of the model that has not run.
        example: inputs on the meta device.
    """
    of_inputs = {p for p, value in filled.items() if "[" in p[1] and isinstance(value, Tensor) and not is_known(value)}
    if not of_inputs:
        return filled
    model, lists = make_copy(), []
    for _ in range(3):
        Recorder(model).run(example)
        values = [(a.path, a.name, a.read()) for a in list_attributes(model)]
        lists.append({(path, name): [*value] for path, name, value in values if isinstance(value, (list, deque))})
    *_, before, after = lists
    changing = {place for place, members in after.items() if not _are_same(members, before.get(place, ()))}
    state = {(path, name) for path, name in of_inputs if (path, name.partition("[")[0]) in changing}
    return {place: value for place, value in filled.items() if place not in state}


def _are_same(members: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the same tensors; numbers may differ."""
    one, other = ([id(v) for _, v in list_values(values) if isinstance(v, Tensor)] for values in (members, others))
    return one == other


def _grows(place: AttributeName, later: Sequence[Holdings]) -> bool:
    """Whether something stands in a container that gets more in each run, as a log does."""
    path, name = place
    root, _, inside = name.partition("[")
    sizes = [sum(p == path and n.startswith(f"{root}[") for p, n in holdings) for holdings in later] if inside else [0]
    return sizes[0] < sizes[-1] and sizes[0] > 0


@dataclass(frozen=True)
class KeptNumbers:
    """Ordinary numbers that a run of the widest has left, of which nobody knows where they come from.

    Attributes:
        numbers: these numbers; the forward may compute them anew each time.
        fresh: a meta copy that has not run.
        later: one that has run.
        examples: the inputs of the runs, on the meta device, each with whether it was one in train() mode.
        data: by name, the tensors with data.
    """

    numbers: Holdings
    fresh: nn.Module
    later: nn.Module
    examples: Sequence[tuple[bool, Any]]
    data: Mapping[str, Tensor]

    def find_stale(self, slices: Slices) -> AttributeName | None:
        """Return a number that a subnet computes if it runs first, and gets from the widest else; None if all agree."""
        fresh, later = (self._run(model, slices) for model in (self.fresh, self.later))
        for place, number in self.numbers.items():
            if later.get(place) == number and fresh.get(place) != number:
                return place
        return None

    def _run(self, model: nn.Module, slices: Slices) -> Holdings:
        subnet = replicate(model, slices)
        runner = Recorder(subnet, data=self.data)
        for training, example in self.examples:
            subnet.train(training)
            runner.run(example)
        runner.release()
        return list_holdings(subnet)


def may_keep(model: nn.Module) -> bool:
    """Whether modules hold tensors or numbers that their forward may have computed, as far as its code tells."""
    return any(True for _ in _list_candidates(model))


def find_caches(model: nn.Module, example: Any) -> dict[AttributeName, bool]:
    """Return the attributes that hold tensors and numbers which a forward would compute again if they were not there.

    Args:
        model: the model, which may have run.
        example: inputs on the meta device.

    Returns:
        By place, whether it is a container that is to be emptied.
    """
    choices = dict(_list_candidates(model))
    if choices:
        shared = _list_shared(copy_to_meta(model), copy_to_meta(model))
        choices = {place: ways for place, ways in choices.items() if place not in shared}
    for _ in range(_MOST_TRIES):
        places = {place: ways[0] for place, ways in choices.items()}
        if not places:
            break
        meta_copy = copy_to_meta(model).eval()
        empty_attributes(meta_copy, places)
        try:
            Recorder(meta_copy).run(example)
        except Exception:  # whatever a forward raises that needs one of them
            last = [*places][-1][1]
            choices = {place: ways[place[1] == last :] for place, ways in choices.items()}
            choices = {place: ways for place, ways in choices.items() if ways}
            continue
        filled = {(a.path, a.name) for a in list_attributes(meta_copy) if _is_filled(a.read())}
        if filled.issuperset(places):
            return places
        choices = {place: ways for place, ways in choices.items() if place in filled}
    return {}


def _list_shared(meta_copy: nn.Module, other: nn.Module) -> set[AttributeName]:
    """Return the attributes of objects that two copies of a model share: emptying them would empty them for all copies.

    The layers of einops get such objects from a cache when they are copied. Functions are shared too, but what they
    hold is put back after a trace.
    """
    ids = {id(part) for a in list_attributes(other) for part in (a.store, a.read())}
    attributes = [a for a in list_attributes(meta_copy) if not isinstance(a.owner, types.FunctionType)]
    changing = (MutableMapping, MutableSet, list, deque)
    return {
        (a.path, a.name)
        for a in attributes
        if id(a.store) in ids or (isinstance(value := a.read(), changing) and id(value) in ids)
    }


def empty_attributes(model: nn.Module, places: Mapping[AttributeName, bool]) -> None:
    """Put attributes back to what the constructor left: None, a number, or nothing if it does not name them."""
    for attribute in list(list_attributes(model)) if places else ():
        empties = places.get((attribute.path, attribute.name))
        if empties is None:
            continue
        if empties:
            attribute.read().clear()
            continue
        is_named, first = find_first_value(attribute.owner, attribute.key)
        if is_named:
            attribute.write(first)
        else:
            attribute.remove()


def _list_candidates(model: nn.Module) -> Iterator[tuple[AttributeName, tuple[bool, ...]]]:
    """Yield attributes that the forward may have computed, each with the ways to empty it."""
    attributes = list(list_attributes(model))
    writes = find_writes(model, attributes)
    for attribute in attributes:
        name, value = attribute.name.rpartition(".")[2], attribute.read()
        if _is_persistent(attribute) or not _is_filled(value):
            continue
        fills = isinstance(value, (MutableMapping, MutableSet, list, deque)) and name in writes.containers
        ways = (*([True] if fills else []), *([False] if writes.sets(name) else []))
        if ways:
            yield (attribute.path, attribute.name), ways


def _is_filled(value: Any) -> bool:
    """Whether a value holds tensors or numbers."""
    members = value if isinstance(value, MutableSet) else ()
    return any(True for _ in list_values(value)) or any(isinstance(member, (int, float)) for member in members)


def _is_persistent(attribute: Attribute) -> bool:
    """Whether it is a buffer that belongs to the model's state, and that the constructor registers."""
    module = attribute.owner
    if not isinstance(module, nn.Module) or attribute.store is not module._buffers:
        return False
    return attribute.key not in module._non_persistent_buffers_set and find_first_value(module, attribute.key)[0]
