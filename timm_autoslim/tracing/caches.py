"""Tensors that a forward computes once and keeps in its module, such as `if self._w is None: self._w = ...`.

A subnet gets what the widest has kept, so no width may decide it.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from timm_autoslim.slicing.slices import is_cache
from timm_autoslim.tracing.record import Recorder
from timm_autoslim.utils.meta import copy_to_meta
from timm_autoslim.utils.tensors import collect_tensors

Kept = dict[tuple[str, str], tuple[Tensor, ...]]


def list_kept_tensors(model: nn.Module) -> Kept:
    """Return the tensors that modules hold in attributes and buffers, by the module's path and the name there.

    Without the dicts of which it is known that they are caches: those start empty in a subnet.
    """
    kept: Kept = {}
    for path, module in model.named_modules():
        attributes = {n: v for n, v in vars(module).items() if n not in _OF_EVERY_MODULE and not _is_plain(v)}
        for name, value in (*attributes.items(), *module._buffers.items()):
            tensors = () if is_cache(type(module), name, value) else tuple(collect_tensors(value))
            if tensors:
                kept[path, name] = tensors
    return kept


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str, nn.Module)) or callable(value)


def find_filled(before: Kept, *later: Kept) -> Kept:
    """Return what runs have kept: it was not there before, and stayed to the end.

    Args:
        before: what the modules held before the runs.
        later: what they held after each run.
    """
    filled: Kept = {}
    for place, tensors in later[-1].items():
        ids = [id(tensor) for tensor in tensors]
        if ids != [id(t) for t in before.get(place, ())]:
            first = next(kept[place] for kept in later if place in kept)
            if ids == [id(t) for t in first]:
                filled[place] = tensors
    return filled


def find_caches(model: nn.Module, example: Any) -> list[tuple[str, str]]:
    """Return the attributes that hold tensors which a forward would compute again if they were not there.

    Args:
        model: the model, which may have run.
        example: inputs on the meta device.
    """
    candidates = list(_list_candidates(model))
    while candidates:
        meta_copy = copy_to_meta(model).eval()
        empty_attributes(meta_copy, candidates)
        try:
            Recorder(meta_copy).run(example)
        except Exception:  # whatever a forward raises that needs one of them
            candidates.pop()
            continue
        kept = list_kept_tensors(meta_copy)
        if all(place in kept for place in candidates):
            return candidates
        candidates = [place for place in candidates if place in kept]
    return []


def empty_attributes(model: nn.Module, places: list[tuple[str, str]]) -> None:
    """Put these attributes back to what the constructor left: None, or nothing if it does not name them."""
    for path, name in places:
        module = model.get_submodule(path)
        if name in module._buffers:
            module._buffers[name] = None
        elif _is_stored(type(module), name, by_constructor=True):
            module.__dict__[name] = None
        else:
            del module.__dict__[name]


def _list_candidates(model: nn.Module) -> Iterator[tuple[str, str]]:
    for path, name in list_kept_tensors(model):
        module = model.get_submodule(path)
        plain = not type(module).__module__.startswith("torch.nn.")
        if plain and name not in module.state_dict() and _is_stored(type(module), name, by_constructor=False):
            yield path, name


def _is_stored(kind: type, name: str, by_constructor: bool) -> bool:
    """Whether the constructor of a class, or another method, sets an attribute of this name."""
    members = [getattr(m, "fget", None) or m for base in kind.__mro__ for m in vars(base).values()]  # of properties
    functions = [f for f in members if isinstance(f, FunctionType) and name in f.__code__.co_names]
    codes = [f.__code__ for f in functions if (f.__name__ == "__init__") is by_constructor]
    return any(i.opname == "STORE_ATTR" and i.argval == name for code in codes for i in dis.get_instructions(code))
