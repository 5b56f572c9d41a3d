"""All slices of a model, and what they make of it for good: a copy, or the model itself, with weights of its own."""

from __future__ import annotations

import dis
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from timm_autoslim.slicing.attributes import Value, set_attributes
from timm_autoslim.slicing.tensors import Axis, copy_slice
from timm_autoslim.utils.copying import copy_deeply
from timm_autoslim.utils.tensors import list_leaves

M = TypeVar("M", bound=nn.Module)
V = TypeVar("V")


@dataclass(frozen=True)
class Slices:
    """What tells a subnet from its model: a slice of each narrowed tensor, and the attributes that change with it.

    Attributes:
        tensors: by the tensor's name in the model (`layer1.0.conv1.weight`), one `Axis` for each dimension.
        attributes: by path (`layer1.0.conv1.groups`, `feature_info.0.num_chs`), the value in the subnet.
    """

    tensors: Mapping[str, tuple[Axis, ...]]
    attributes: Mapping[str, Value]

    def within(self, path: str) -> Slices:
        """Return the slices of one module and of the modules in it, by names in that module."""
        return Slices(cut_prefix(self.tensors, f"{path}."), cut_prefix(self.attributes, f"{path}."))

    @cached_property
    def _by_module(self) -> list[tuple[list[str], list[tuple[str, tuple[Axis, ...]]]]]:
        """The tensors by module: the parts of the module's path, and for each of its tensors the name and the axes."""
        modules: dict[str, list[tuple[str, tuple[Axis, ...]]]] = {}
        for name, axes in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            modules.setdefault(path, []).append((leaf, axes))
        return [(path.split(".") if path else [], members) for path, members in modules.items()]


def cut_prefix(values: Mapping[str, V], prefix: str) -> dict[str, V]:
    """Return the values whose names begin with a prefix, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def compose_runs(
    runs: Iterable[tuple[int, int]], earlier: int | Sequence[Sequence[int]] | None
) -> int | list[list[int]]:
    """Return two slices of an axis, one taken after the other, as one slice.

    Args:
        runs: (start, length) of the second slice, counted in the channels that the first one left.
        earlier: the first slice: its runs; or None or a number, if it kept the axis or the first few channels.

    Returns:
        The runs [start, length], counted in the axis itself; or a number, if they are the first few channels.
    """
    channels = [i for start, n in runs for i in range(start, start + n)]
    if isinstance(earlier, Sequence):
        left = [i for start, n in earlier for i in range(start, start + n)]
        channels = [left[i] for i in channels]
    result: list[list[int]] = []
    for i in channels:
        if result and sum(result[-1]) == i:
            result[-1][1] += 1
        else:
            result.append([i, 1])
    return result[0][1] if len(result) == 1 and not result[0][0] else result


class Entry(NamedTuple):
    """A tensor to slice: its module, the dict of the module that holds it, its key there, itself, its slice."""

    module: nn.Module
    store: dict[str, Any]
    leaf: str
    tensor: Tensor
    axes: tuple[Axis, ...]


def find_entries(model: nn.Module, slices: Slices) -> list[Entry]:
    """Find the tensors that `slices` names.

    Raises:
        KeyError: the model has no tensor of a name.
    """
    entries: list[Entry] = []
    for parts, members in slices._by_module:
        module: nn.Module | None = model
        for part in parts:
            module = None if module is None else module._modules.get(part)
        if module is None:
            raise KeyError(".".join((*parts, members[0][0])))
        for leaf, axes in members:
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
            for store in stores:
                if leaf in store:
                    entries.append(Entry(module, store, leaf, store[leaf], axes))
                    break
            else:
                raise KeyError(".".join((*parts, leaf)))
    return entries


def is_cache(kind: type, name: str, value: Any) -> bool:
    """Whether an attribute of a module is a dict in which it caches tensors between calls, such as attention biases.

    Args:
        kind: the class of the module; tensors that none of its methods but the constructor stores are constants, and a
            dict that the constructor fills is state.
        name, value: the attribute.
    """
    holds = (
        type(value) is dict
        and name[0] != "_"
        and any(isinstance(leaf, Tensor) for v in value.values() for leaf in list_leaves(v))
    )
    return holds and _stores_into(kind, name)


_STORING: WeakKeyDictionary[type, dict[str, bool]] = WeakKeyDictionary()  # the code of a class is looked at once
_READERS = ("get", "items", "keys", "values")
_WRITERS = {"setdefault", "update", "pop", "popitem", "clear", "__setitem__"}


def _stores_into(kind: type, name: str) -> bool:
    """Whether a method of a class, but its constructor, may store into a dict that it keeps under this name."""
    names = _STORING.setdefault(kind, {})
    if name not in names:
        functions = [f for base in kind.__mro__ for f in vars(base).values() if isinstance(f, FunctionType)]
        codes = [f.__code__ for f in functions if f.__name__ != "__init__" and name in f.__code__.co_names]
        stores = any(_stores(code) and not _looks_up(code, name) for code in codes)
        constructors = [
            f.__code__ for base in kind.__mro__ if isinstance(f := vars(base).get("__init__"), FunctionType)
        ]
        names[name] = stores and not any(_fills(code, name) for code in constructors)
    return names[name]


def _fills(constructor: CodeType, name: str) -> bool:
    """Whether a constructor makes a dict with items under this name, or puts items into it."""
    steps = [i for i in dis.get_instructions(constructor) if i.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
    for i, step in enumerate(steps):
        if step.opname == "STORE_ATTR" and step.argval == name and i > 1:
            value = steps[i - 2]
            if value.opname in ("BUILD_CONST_KEY_MAP", "DICT_UPDATE", "DICT_MERGE", "MAP_ADD", "KW_NAMES"):
                return True
            if value.opname in ("BUILD_MAP", "CALL", "CALL_FUNCTION") and value.arg:
                return True
            if value.opname == "CALL" and steps[i - 3].opname in ("GET_ITER", "KW_NAMES"):
                return True  # a comprehension
        if step.opname.startswith("LOAD_ATTR") and step.argval == name:
            following = [other.opname for other in steps[i + 1 : i + 4]]
            if "STORE_SUBSCR" in following or steps[i + 1].argval in _WRITERS:
                return True
    return False


def _stores(code: CodeType) -> bool:
    """Whether a function stores or deletes items of anything."""
    if not _WRITERS.isdisjoint(code.co_names):
        return True
    return any(instruction.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") for instruction in dis.get_instructions(code))


def _looks_up(code: CodeType, name: str) -> bool:
    """Whether a function uses an attribute as `self.name[key]`, `self.name.get(key)` or the like alone."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
    for i, *following in zip(instructions, instructions[1:], instructions[2:], strict=False):
        if i.opname.startswith("LOAD_ATTR") and i.argval == name:
            item = following[1].opname.startswith("BINARY_SUBSCR") and following[0].opname.startswith("LOAD_")
            if not item and following[0].argval not in _READERS:
                return False
    return True


_PROPERTIES: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()  # a class is looked at once


def list_cached_properties(kind: type) -> frozenset[str]:
    """Return the names of the attributes of a class that are computed once for each object (`cached_property`)."""
    if kind not in _PROPERTIES:
        names = (n for base in kind.__mro__ for n, v in vars(base).items() if isinstance(v, cached_property))
        _PROPERTIES[kind] = frozenset(names)
    return _PROPERTIES[kind]


def clear_caches(modules: Iterable[nn.Module]) -> None:
    """Empty the dicts in which modules cache tensors from one call to the next, such as LeViT's attention biases.

    What a `cached_property` has computed is forgotten too.
    """
    for module in modules:
        if type(module).__module__.startswith("torch.nn.modules."):
            continue  # torch's own modules have no such caches, and are many
        for name in [name for name, value in module.__dict__.items() if is_cache(type(module), name, value)]:
            module.__dict__[name] = {}
        for name in list_cached_properties(type(module)):
            module.__dict__.pop(name, None)


def extract_model(model: M, slices: Slices) -> M:
    """Return a copy of `model` that holds the slices alone, with weights of its own.

    Of tensors that are sliced no full copy is made. Tied parameters stay tied.

    Raises:
        KeyError, IndexError: the model has no tensor or attribute of a name.
    """
    memo: dict[int, object] = {}
    for entry in find_entries(model, slices):
        if id(entry.tensor) not in memo:
            memo[id(entry.tensor)] = copy_slice(entry.tensor, entry.axes)
    for module in model.modules():  # activations that modules store: deepcopy refuses results of autograd
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    extracted = copy_deeply(model, memo)
    _adapt_modules(extracted, slices)
    return extracted


def shrink_model(model: nn.Module, slices: Slices) -> None:
    """Reduce `model` in place to the slices. Tied parameters stay tied.

    Raises:
        KeyError, IndexError: the model has no tensor or attribute of a name.
    """
    entries = find_entries(model, slices)
    counts = Counter(id(entry.tensor) for entry in entries)
    recurrent = {entry.module for entry in entries if isinstance(entry.module, nn.RNNBase)}
    tied: dict[int, tuple[Tensor, Tensor]] = {}
    while entries:  # each tensor is released once it is sliced, so that the next slices can use its memory
        _, store, leaf, tensor, axes = entries.pop()
        slice_ = tied[id(tensor)][1] if id(tensor) in tied else copy_slice(tensor, axes)
        if counts[id(tensor)] > 1:
            tied[id(tensor)] = (tensor, slice_)
        store[leaf] = slice_
    for module in recurrent:  # they hold their weights in a list too, which TorchScript reads
        module._init_flat_weights()
    _adapt_modules(model, slices)


def _adapt_modules(model: nn.Module, slices: Slices) -> None:
    """Set the attributes of a subnet, and let its modules forget what they computed at other widths."""
    if slices.tensors or slices.attributes:
        clear_caches(model.modules())
    set_attributes(model, slices.attributes)
