"""Weights of a model that its code finds where no copy of it has its own: they are at full width in every subnet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn

from timm_autoslim.errors import ModelChangedError, TraceError
from timm_autoslim.slicing.attributes import MODULE_NAMES
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import Label
from timm_autoslim.utils.forwards import list_mentioned_names
from timm_autoslim.utils.redirecting import CONSTANTS
from timm_autoslim.utils.tensors import list_slots, named_tensors
from timm_autoslim.utils.ways import EVERY_ATTRIBUTE, Walk, Way, is_skipped

_MOST_LEVELS = 4  # of objects in each other
_MOST_OBJECTS = 10_000
_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
}
_FOLLOWED = "code that finds layers through modules, or through methods, closures, lists and dicts of them"
_REMEDY = "let it take the layer from the module that it gets or close over the model itself, or remove it"


_GLOBAL: Any = nn.modules.module


@dataclass(frozen=True)
class Stray:
    """A way from the code of a copy of a model, or of a subnet, to a part of the model itself.

    Attributes:
        path: the module whose code it is.
        code: the code, such as "a forward hook (Trainer.hook)".
        part: the path of the module, or the name of the tensor, that it finds.
        way: how it finds it, such as "Trainer.model.a".
    """

    path: str
    code: str
    part: str
    way: str

    def __str__(self) -> str:
        return f"{self.path or 'the model'}: {self.code} can read {self.part} as {self.way}"


def find_strays(
    copied: nn.Module, model: nn.Module, slices: Slices | None = None, *, hooks_only: bool = False
) -> list[Stray]:
    """Return the ways from the hooks, functions and objects of a copy to the model that it was made of.

    Nothing runs: what code can read is told by the names in it.

    Args:
        copied: a copy of the model, or a subnet of it.
        model: the model.
        slices: those of the subnet; only what they change of the model counts. All of it counts for None.
        hooks_only: look at hooks, and not at what forwards find.

    Example:
        >>> import copy
        >>> class Holder:
        ...     pass
        >>> model, holder = nn.Sequential(nn.Linear(2, 2)), Holder()
        >>> holder.layer = model[0]
        >>> _ = model[0].register_forward_hook(lambda module, args, out: out + holder.layer.bias)
        >>> print(*find_strays(copy.deepcopy(model), model))
        0: a forward hook (<lambda>) can read 0 as holder.layer
    """
    modules = list(copied.named_modules())
    starts = [(path, *start) for path, module in modules for start in _list_starts(module, hooks_only)]
    starts += [("", f"a hook of all modules ({_name_code(hook)})", [(hook, "")], ()) for hook in list_global_hooks()]
    if not starts:
        return []
    walk, strays = Walk(_list_ends(model, slices), {id(module) for _, module in modules}, model), list[Stray]()
    for path, code, ways, names in starts:
        strays += [Stray(path, code, part, way) for part, way in sorted(walk.find(ways, names).items())]
    return strays


def list_global_hooks() -> list[Any]:
    """Return the hooks that run in every module there is."""
    return [*_GLOBAL._global_forward_hooks.values(), *_GLOBAL._global_forward_pre_hooks.values()]


def check_copy(copied: nn.Module, model: nn.Module) -> None:
    """Make sure that hooks, functions and objects of a copy of a model do not lead to the model itself.

    Raises:
        TraceError: one may; the text says by which way.
    """
    _refuse(find_strays(copied, model))


def check_classes(model: nn.Module) -> None:
    """Make sure that the classes of modules, which all copies share, do not lead to the model itself.

    Raises:
        TraceError: the code of one may, by a global name, a closure or a class attribute; the text says by which way.
    """
    kinds = {type(module): path for path, module in model.named_modules() if not is_skipped(type(module).__module__)}
    walk = Walk(_list_ends(model, None), set(), model)
    for kind, path in kinds.items():
        found = walk.find([(kind, kind.__name__)], {"forward"})
        _refuse([Stray(path, "the forward", part, way) for part, way in sorted(found.items())])


def _refuse(strays: Sequence[Stray]) -> None:
    for stray in strays:
        raise TraceError.at(
            stray.path or "the model",
            got=f"{stray.code} that can read {stray.part} as {stray.way}, also in a copy of the model",
            needed=_FOLLOWED,
            remedy=_REMEDY,
        )


def freeze_strays(graph: ChannelGraph, model: nn.Module) -> tuple[ChannelGraph, list[str]]:
    """Return a graph in which what the code of subnets may read of the model itself is fixed, and the reasons."""
    slices = graph.slices(graph.floors)
    groups = defaultdict[tuple[str, str], list[Stray]](list)
    for stray in find_strays(replicate(model, slices), model, slices):
        groups[stray.path, stray.code].append(stray)
    reasons = []
    for strays in groups.values():
        more = f" (and {len(strays) - 1} more)" if strays[1:] else ""
        reasons.append(f"{strays[0]}{more}, which has its full width in a subnet; {_REMEDY}")
        graph = graph.freeze([vector for stray in strays for vector in _list_vectors(graph, stray.part)], reasons[-1])
    return graph, reasons


def _list_vectors(graph: ChannelGraph, part: str) -> list[Label]:
    """Return the channels of a tensor, or of a module: of its weights, and those that its attributes count."""
    observed, first = graph.observations, graph.tied_names
    names = {first.get(name, name) for name in (*graph.shapes, *first) if f"{name}.".startswith(f"{part}.")}
    uses = [use for use in (*observed.attributes, *observed.descriptions) if use.path.startswith(f"{part}.")]
    return [*(v for (name, _), v in observed.vectors.items() if name in names), *(use.vector for use in uses)]


def check_subnet(subnet: nn.Module, model: nn.Module, slices: Slices | None) -> None:
    """Make sure that what runs in a subnet finds no part of the model itself that it would find narrower in its own.

    Args:
        subnet: a replica of the model; or an extracted model, which must not find any part of the other one.
        model: the model of the supernet.
        slices: those of a replica.

    Raises:
        ModelChangedError: its code may. It had no such way when the model was converted.
    """
    for stray in find_strays(subnet, model, slices, hooks_only=slices is not None):  # `convert` has seen the forwards
        raise ModelChangedError.at(
            stray.path or "the model",
            got=f"{stray.code} that can read {stray.part} of the original as {stray.way}, also in a subnet",
            needed=_FOLLOWED,
            remedy=f"{_REMEDY}; or convert the model with it, which fixes these channels or says why it cannot",
        )


def _list_ends(model: nn.Module, slices: Slices | None) -> dict[int, str]:
    """Return the parts of a model that a copy must not read, by id: all but the model itself, or what slices change."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if slices is None:
        tensors = named_tensors(model)
        return {**{id(t): name for name, t in tensors.items()}, **{id(m): path for path, m in modules.items() if path}}
    ends: dict[int, str] = {}
    touched = set[str]()
    for name in slices.tensors:
        path, _, leaf = name.rpartition(".")
        namespace = modules[path].__dict__
        stores = (namespace["_parameters"], namespace["_buffers"], namespace)
        ends.setdefault(id(next(store[leaf] for store in stores if leaf in store)), name)
    for path in {name.rpartition(".")[0] for name in (*slices.tensors, *slices.attributes)}:
        while path and path not in touched:
            touched.add(path)
            path = path.rpartition(".")[0]
    return {**ends, **{id(module): path for path, module in modules.items() if path in touched}}


def _list_starts(module: nn.Module, hooks_only: bool) -> Iterator[tuple[str, list[Way], Iterable[str]]]:
    """Yield the code that runs in a module, and what it starts from: a hook and the module, or the module's attributes.

    Each is in words, with the ways that it starts from, and the names that it mentions.
    """
    namespace = module.__dict__
    for name, text in _HOOKS.items():
        for hook in namespace[name].values() if namespace.get(name) else ():
            if str(getattr(hook, "__module__", "")).partition(".")[0] == "timm_autoslim":  # counts the images of scores
                continue
            yield f"{text} ({_name_code(hook)})", [(hook, ""), (module, "its module")], ()
    if hooks_only:
        return
    names = list_mentioned_names(type(module))
    mentioned = namespace.keys() if not names.isdisjoint(EVERY_ATTRIBUTE) else namespace.keys() & names
    ways = [
        (value, f"self.{name}")
        for name in mentioned
        if (kind := type(value := namespace[name])) not in CONSTANTS
        and name not in MODULE_NAMES
        and not (kind in (tuple, list) and CONSTANTS.issuperset(map(type, value)))
        and not isinstance(value, Enum)
    ]
    if ways:
        yield "the forward", ways, names


def _name_code(hook: Any) -> str:
    while hasattr(hook, "func"):  # a partial
        hook = hook.func
    return str(getattr(hook, "__qualname__", type(hook).__name__)).rpartition("<locals>.")[2]


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
