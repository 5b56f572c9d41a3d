"""Bind the attributes that no forward reads, but other methods do: `reparameterize`, `fuse`, `reset` and the like."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from timm_autoslim.tracing.labels import AttributeUse, Label
from timm_autoslim.utils.codes import list_names, reach_names

# Words of names of attributes that count channels (`in_chs`, `dim_out`, `hidden_size`, `c1`), and of some that do not.
_CHANNELS = {"c", "cin", "cout", "ch", "chan", "chans", "channel", "channels", "chn", "chs", "cmid", "dim", "dims"}
_CHANNELS |= {"embd", "embed", "feat", "feats", "feature", "features", "filter", "filters", "growth", "hidden", "inc"}
_CHANNELS |= {"inp", "inplanes", "nc", "nf", "oup", "outc", "outplanes", "plane", "planes", "units", "width", "widths"}
_WITH_SIZE = {"in", "out", "input", "output", "hidden", "embed"}
_OTHERS = {"classes", "depth", "end", "ends", "head", "heads", "height", "image", "img", "index", "kernel", "layers"}
_OTHERS |= {"pad", "padding", "patch", "ratio", "rank", "reduction", "resolution", "scale", "spatial", "stride"}
_OTHERS |= {"tokens", "window"}
_INPUT = {"c", "cin", "dim", "in", "inc", "inp", "inplanes", "input"}
_OUTPUT = {"cout", "out", "outc", "output", "oup", "outplanes"}


@cache
def _list_words(name: str) -> tuple[str, ...]:
    return tuple(word.rstrip("0123456789") for word in re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))


@cache
def counts_channels(name: str) -> bool:
    """Whether an attribute of this name counts channels, as far as a name can tell."""
    words = frozenset(_list_words(name))
    wanted = _WITH_SIZE if "size" in words else _CHANNELS
    return words.isdisjoint(_OTHERS) and not words.isdisjoint(wanted)


def list_names_read(cls: type) -> frozenset[str]:
    """Return the names that methods of a class mention, but for the constructor and what the forward calls."""
    methods = _list_methods(cls)
    reached = {*reach_names(["forward"], methods, methods.__getitem__), "__init__"}
    return frozenset(name for method, names in methods.items() if method not in reached for name in names)


def _list_names_run(cls: type) -> frozenset[str]:
    """Return the names that the forward of a class mentions, and the methods that it calls."""
    methods = _list_methods(cls)
    return frozenset(
        name for method in reach_names(["forward"], methods, methods.__getitem__) for name in methods[method]
    )


def list_other_forwards(model: nn.Module, bound: Collection[str]) -> dict[str, list[str]]:
    """Return the methods that may take the place of a module's forward, as for exports, and the modules that have them.

    They are called `forward_...`, take what the forward takes, and read an attribute that the forward does not.

    Args:
        model: the model.
        bound: paths of the attributes that are bound already.
    """
    forwards: dict[str, list[str]] = {}
    replacements = {kind: _list_replacements(kind) for kind in {type(module) for module in model.modules()}}
    for path, module in model.named_modules():
        for name, attributes in replacements[type(module)].items():
            paths = [f"{path}.{a}" if path else a for a, v in vars(module).items() if a in attributes and _is_size(v)]
            if any(p not in bound for p in paths):
                forwards.setdefault(name, []).append(path)
    return forwards


def _list_replacements(cls: type) -> dict[str, frozenset[str]]:
    """Return the methods of a class that may take the place of its forward, and the names that each mentions."""
    if cls.__module__.startswith("torch."):
        return {}
    methods = _list_methods(cls)
    reached = reach_names(["forward"], methods, methods.__getitem__)
    names = [name for name in methods if name.startswith("forward_") and name not in reached]
    arguments = {name: _list_arguments(getattr(cls, name)) for name in ("forward", *names)}
    return {n: frozenset(methods[n] - _list_names_run(cls)) for n in names if arguments[n] == arguments["forward"]}


def _list_arguments(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _list_methods(cls: type) -> dict[str, set[str]]:
    """Return the methods of a class that are not torch's, each with the names that its code mentions."""
    methods: dict[str, set[str]] = {}
    for owner in cls.__mro__:
        if owner is object or owner.__module__.startswith("torch."):
            continue
        for name, member in vars(owner).items():
            function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
            if isinstance(code := getattr(function, "__code__", None), CodeType):
                methods.setdefault(name, set()).update(list_names(code))
    return methods


@dataclass(frozen=True)
class Surroundings:
    """What a trace knows of a model.

    Attributes:
        model: the meta copy.
        uses: the attributes that are bound already.
        inputs: by module, the labels of its first input.
        outputs: by module, the labels of its outputs.
        weights: by name, the labels of the tensors of the model.
    """

    model: nn.Module
    uses: Sequence[AttributeUse]
    inputs: Mapping[str, Sequence[Label]]
    outputs: Mapping[str, Sequence[Label]]
    weights: Mapping[str, Sequence[Label]]

    def find_uses(self) -> Iterator[AttributeUse]:
        """Yield the uses of attributes that other methods than the forward read, in modules that are not torch's own.

        One whose name says that it counts channels follows the first channels that are as many: of the module's input,
        of its output, or of a weight in it. One that has the name and the value of an attribute of a module below
        (`groups`) follows that one.
        """
        modules = list(self.model.named_modules())
        kinds = {type(module) for _, module in modules}
        read = frozenset(name for kind in kinds for name in list_names_read(kind))
        run = {kind: _list_names_run(kind) for kind in kinds}  # the trace has bound what counts channels there
        bound = {use.path for use in self.uses}
        for path, module in modules:
            if type(module).__module__.startswith("torch."):
                continue
            names = read - run[type(module)]
            for name in [n for n in module.__dict__ if n in names and not n.startswith("_")]:
                for leaf, value in _list_integers(name, module.__dict__[name]):
                    full = f"{path}.{leaf}" if path else leaf
                    use = None if full in bound else self._find_use(path, name, value, leaf != name)
                    if use is not None:
                        yield AttributeUse(full, value, use.vector, use.power)

    def _find_use(self, path: str, name: str, value: int, is_item: bool) -> AttributeUse | None:
        """Return a use of the channels that an attribute of this value counts; None if there is none.

        Args:
            path: the module.
            name: the attribute.
            value: its value, or that of an item of it.
            is_item: whether it is a list, which may count channels of other modules too.
        """
        prefix = f"{path}." if path else ""
        if not counts_channels(name):
            below = [u for u in self.uses if u.path.startswith(prefix) and u.path.rpartition(".")[2] == name]
            use = next((u for u in below if u.value == value), None)
            if use is not None or name != "groups" or self._is_below(prefix, name, value):
                return use
        further = [label for labels in self.outputs.values() for label in labels] if is_item else []
        labels = (*self._order_labels(path, prefix, name), *further)
        match = next((label for label in labels if label is not None and len(label) == value), None)
        return None if match is None else AttributeUse(path, value, match)

    def _is_below(self, prefix: str, name: str, value: int) -> bool:
        """Whether a module below has an attribute of this name and value, such as the `groups` of a convolution."""
        modules = dict(self.model.named_modules())
        below = (module for path, module in modules.items() if path.startswith(prefix) and path != prefix[:-1])
        return any(vars(module).get(name) == value for module in below)

    def _order_labels(self, path: str, prefix: str, name: str) -> Iterator[Label]:
        """Yield the labels that an attribute may count: those that its name suggests first, then others near it."""
        words = frozenset(_list_words(name))
        ends = [*self.inputs.get(path, ()), *self.outputs.get(path, ())]
        if not words.isdisjoint(_OUTPUT):
            ends = [*self.outputs.get(path, ()), *self.inputs.get(path, ())]
        near = sorted((w for w in self.weights if w.startswith(prefix)), key=lambda w: w.count("."))
        within = [label for weight in near for label in self.weights[weight]]
        is_inner = "hidden" in words or words.isdisjoint(_INPUT | _OUTPUT)
        yield from (*within, *ends) if is_inner else (*ends, *within)


def _list_integers(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """Yield the integers above 1 of an attribute, each with its path in the module."""
    items: Iterable[tuple[str, Any]] = [(name, value)]
    if isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
        items = [(f"{name}.{i}", item) for i, item in enumerate(value)]
    for path, item in items:
        if _is_size(item):
            yield path, int(item)
