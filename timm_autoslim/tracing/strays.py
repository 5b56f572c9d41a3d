"""Weights of a model that its code finds where no copy of it has its own: they are at full width in every subnet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from timm_autoslim.slicing.attributes import MODULE_NAMES
from timm_autoslim.utils.tensors import list_slots, named_tensors

_MOST_LEVELS = 4  # of objects in each other
_MOST_OBJECTS = 10_000


def explain_stray(model: nn.Module, name: str) -> str:
    """Return why a weight has its full width in a subnet, and what to do.

    Args:
        model: the model.
        name: of the weight; a run of a subnet has read all of it.
    """
    parts = name.split(".")[:-1]
    names = {id(model.get_submodule(".".join(parts[:n]))): ".".join(parts[:n]) for n in range(len(parts) + 1)}
    names[id(named_tensors(model)[name])] = name
    for owner, module in model.named_modules():
        for attribute, value in vars(module).items():
            for holder, item in _list_holdings(value) if attribute not in MODULE_NAMES else ():
                if id(item) in names:
                    what, place = names[id(item)], f"{owner}.{attribute}" if owner else attribute
                    return (
                        f"{name} has its full width: {what or 'the model'} is also held by an object of class "
                        f"{type(holder).__name__} ({place}), outside of the module tree; the forward must find it "
                        f"as self{'.' if what else ''}{what}"
                    )
    return f"{name} has its full width: the forward must find it as self.{name}"


def _list_holdings(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the modules and tensors that objects hold, each after the object; not what the model itself holds."""
    waiting, visited = [(value, value, 0)], set[int]()
    while waiting and len(visited) < _MOST_OBJECTS:
        item, holder, level = waiting.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, (nn.Module, Tensor)):
            if holder is not item and not isinstance(holder, (list, tuple, dict)):
                yield holder, item
            continue
        if level == _MOST_LEVELS or isinstance(item, (type, str, bytes, int, float)):
            continue
        if isinstance(item, (list, tuple, dict)):
            members = item.values() if isinstance(item, dict) else item
            waiting += [(member, holder if level else item, level + 1) for member in members]
        else:
            members = [*getattr(item, "__dict__", {}).values()]
            members += [getattr(item, slot, None) for slot in list_slots(type(item))]
            waiting += [(member, item, level + 1) for member in members]
