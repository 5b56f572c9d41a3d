"""Replicas: a subnet as new modules over the model's own tensors, which leaves no trace in the model."""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn

from timm_autoslim.slicing.attributes import MODULE_NAMES, set_attributes
from timm_autoslim.slicing.slices import Slices, find_entries, is_cache, list_cached_properties
from timm_autoslim.slicing.tensors import clone_tensors, slice_for_call
from timm_autoslim.utils.collecting import pause_collection
from timm_autoslim.utils.redirecting import CONSTANTS, PLAIN_DICTS, STORES, Redirector, fill, rebuild

M = TypeVar("M", bound=nn.Module)

_MODULE = nn.Module().__dict__  # what every module has
_HOOKS = tuple(name for name, value in _MODULE.items() if type(value) in PLAIN_DICTS and name not in STORES)


def replicate(model: M, slices: Slices, others: list[Any] | None = None) -> M:
    """Return a subnet of `model` for one call: new modules, with slices where the subnet is narrower.

    Nothing in the model changes, whatever the replica does. Its parameters are those of the model or slices of them, so
    that gradients reach the model's. What a forward may write is copied: buffers, tensor attributes, lists, deques,
    sets and dicts.
    Where a module of the model is referred to (in lists, deques, tuples and dicts of modules, bound methods, partials,
    weak references and closures, hooks among them), the replica refers to its own module. Caches of tensors start
    empty, since they are of another width.

    A replica is as the model is now: make another one when weights, attributes or hooks have changed.

    Args:
        model: the model.
        slices: what is narrower in the subnet.
        others: it gets the functions, and the objects of other classes, that the replica shares with the model or that
            were made over its modules: what else they lead to is the model's own.

    Raises:
        KeyError, IndexError: the model has no tensor or attribute of a name in `slices`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> half = ((0, 4),)  # the first four channels
        >>> tensors = {"0.weight": (half, None), "0.bias": (half,), "1.weight": (None, half)}
        >>> subnet = replicate(model, Slices(tensors, {}))
        >>> subnet(torch.ones(1, 4)).sum().backward()
        >>> model[0].weight.shape, model[0].weight.grad[4:].abs().sum()
        (torch.Size([8, 4]), tensor(0.))
    """
    with pause_collection():
        replication = _Replication(model, slices)
    if others is not None:
        others += replication.others
    return replication.replica  # type: ignore[no-any-return]


class _Replication:
    """Makes one replica.

    Attributes:
        memo: by id of a module, tensor, list or dict of the model, what stands for it in the replica.
    """

    def __init__(self, model: nn.Module, slices: Slices) -> None:
        modules = list(model.modules())
        self.memo: dict[int, Any] = {id(module): object.__new__(type(module)) for module in modules}
        self.memo |= slice_for_call((entry.tensor, entry.axes) for entry in find_entries(model, slices))
        variables = [_list_variables(module) for module in modules]
        self._redirector = Redirector(self.memo)
        self._containers: list[Any] = []  # of the model, whose copies have the same members yet
        self._tuples = set[int]()
        self._copy_state(modules, variables)
        properties = {kind: names for kind in set(map(type, modules)) if (names := list_cached_properties(kind))}
        for module, values in zip(modules, variables, strict=True):
            namespace = self._copy_namespace(type(module), module.__dict__, values)
            for name in properties.get(type(module), ()) if properties else ():
                namespace.pop(name, None)
            object.__setattr__(self.memo[id(module)], "__dict__", namespace)
        for value in self._containers:  # functions in them may refer to any of the copies
            fill(self.memo[id(value)], value, self._find)
        for module, values in zip(modules, variables, strict=True):
            if values:
                namespace = self.memo[id(module)].__dict__
                namespace.update({name: self._find(value) for name, value in values.items() if name in namespace})
        self.replica, self.others = self.memo[id(model)], self._redirector.others
        set_attributes(self.replica, slices.attributes, has_own_dicts=True)

    def _copy_state(self, modules: list[nn.Module], variables: list[dict[str, Any]]) -> None:
        """Copy the tensors that a forward may write; what has a gradient is a weight, and shared."""
        memo = self.memo
        tensors = [t for module in modules for t in module._buffers.values() if t is not None and id(t) not in memo]
        for values in variables:
            tensors += [t for t in values.values() if isinstance(t, Tensor) and id(t) not in memo]
        state = {id(tensor): tensor for tensor in tensors if not tensor.requires_grad}
        memo.update(zip(state, clone_tensors(list(state.values())), strict=True))

    def _copy_namespace(self, kind: type, attributes: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the `__dict__` of a module's replica."""
        namespace, memo = attributes.copy(), self.memo
        for name in STORES:  # most of the work, so without a call for each entry
            store = attributes[name]
            namespace[name] = {key: memo.get(id(item), item) for key, item in store.items()} if store else {}
        for name in _HOOKS:
            hooks = attributes.get(name)
            namespace[name] = OrderedDict()
            if hooks:
                namespace[name] = self.memo[id(hooks)] = hooks.copy()
                self._containers.append(hooks)
        for name, value in variables.items():
            if is_cache(kind, name, value):
                self.memo[id(value)] = {}
            else:
                self._register(value)
        return namespace

    def _register(self, value: Any) -> None:
        """Let copies stand for the dicts, lists and sets in an attribute's value; they are filled once all have one."""
        kind = type(value)
        if kind in CONSTANTS or id(value) in self.memo:
            return
        if kind in PLAIN_DICTS or kind in (list, deque, set):
            self.memo[id(value)] = value.copy()
            if CONSTANTS.issuperset(map(type, chain(value, value.values()) if kind in PLAIN_DICTS else value)):
                return
            self._containers.append(value)
        elif not isinstance(value, tuple) or id(value) in self._tuples:
            return
        self._tuples.add(id(value))
        for member in value.values() if kind in PLAIN_DICTS else value:
            self._register(member)

    def _find(self, value: Any) -> Any:
        """Return what stands for a value in the replica."""
        if type(value) in CONSTANTS:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, tuple):
            self.memo[id(value)] = rebuild(value, list(map(self._find, value)))
            return self.memo[id(value)]
        return self._redirector.redirect(value)


def _list_variables(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that its forward may write or write to, beside what every module has."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if (kind := type(value)) not in CONSTANTS
        and name not in MODULE_NAMES
        and not (kind is tuple and CONSTANTS.issuperset(map(type, value)))
    }
