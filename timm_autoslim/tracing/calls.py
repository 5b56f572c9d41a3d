"""Where sizes enter a trace: the attributes of modules, and the arguments of torch functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from timm_autoslim.slicing.attributes import find_items, list_containers, list_stores, rebuild_tuple
from timm_autoslim.tracing.origins import FromAttribute
from timm_autoslim.tracing.sizes import Size

_PLAIN = frozenset({str, bytes, bool, float, complex, type(None)})
_MOST_LEVELS = 6  # of configurations in each other
_MOST_ITEMS = 1000  # a longer list is no part of a configuration


@dataclass
class FunctionCall:
    """A call of a torch function, with the arguments as the model's code wrote them."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def _list_sizes(self) -> list[list[int]]:
        """Return every list of integers among the arguments, and last all arguments that are integers themselves."""
        values = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, (tuple, list)) and value]
        lists = [list(value) for value in values if all(isinstance(v, int) for v in value)]
        return [*lists, self.list_integers()]

    def list_integers(self) -> list[int]:
        """Return the arguments that are integers themselves."""
        values = (*self.args, *self.kwargs.values())
        return [value for value in values if isinstance(value, int) and not isinstance(value, bool)]

    def find_sizes(self, sizes: Sequence[int]) -> Sequence[int] | None:
        """Return the argument that holds these sizes, with their origins (-1 matches any size), or None."""
        for candidate in self._list_sizes():
            if len(candidate) == len(sizes) and all(
                a == b or a == -1 or b == -1 for a, b in zip(candidate, sizes, strict=True)
            ):
                return candidate
        return None

    def find_size(self, value: int) -> int:
        """Return the argument that equals `value` and has an origin, or `value` if there is none."""
        for candidate in self._list_sizes():
            for size in candidate:
                if size == value and isinstance(size, Size):
                    return size
        return value


def wrap_attributes(model: nn.Module, original: nn.Module | None = None) -> None:
    """Give every integer attribute of every module, also in tuples and lists, its path as the origin.

    So do those of objects, dicts and named tuples that modules hold, such as configurations, and what these hold. One
    that several modules hold has the path of the first.

    Args:
        model: a meta copy.
        original: the model that it is a copy of, if any; what both hold is not the copy's own, and stays as it is.
    """
    wrapper = _Wrapper(original)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in list(module.__dict__.items()):
            if not name.startswith("_"):
                items = find_items(module.__dict__, name)
                module.__dict__[name] = wrapped = wrapper.wrap(value, prefix + name, 0)
                if items is not None:
                    module.__dict__[items] = tuple(wrapped.items())


class _Wrapper:
    """Gives integers their paths."""

    def __init__(self, original: nn.Module | None) -> None:
        self._modules = [] if original is None else list(original.modules())
        self._ids = {id(value) for module in self._modules for value in vars(module).values()}
        self._shares_all = False

    def wrap(self, value: Any, path: str, depth: int) -> Any:
        """Return what takes the place of a value: integers have their path, and so have those that it holds."""
        kind = type(value)
        if kind is int:
            return Size(value, FromAttribute(path))
        if kind in _PLAIN:
            return value
        if kind in (tuple, list) and value and all(type(v) is int for v in value):
            return kind(Size(v, FromAttribute(f"{path}.{i}")) for i, v in enumerate(value))
        if depth >= _MOST_LEVELS or _is_foreign(value):
            return value
        if kind is list or isinstance(value, tuple):
            return self._wrap_items(value, path, depth) if len(value) <= _MOST_ITEMS else value
        if (stores := list_stores(value)) and self._is_own(value, depth):
            self._ids.add(id(value))
            for store in stores:
                for key, member in list(store.items()):
                    if isinstance(key, str) and key.isidentifier():
                        changed = self.wrap(member, f"{path}.{key}", depth + 1)
                        if changed is not member:
                            store[key] = changed
        return value

    def _wrap_items(self, value: Any, path: str, depth: int) -> Any:
        """Return what takes the place of a list or tuple; beside other things an integer counts nothing."""
        is_named = hasattr(value, "_make")
        if not is_named and type(value) not in (list, tuple):  # nobody knows how to make another
            return value
        wrap = [type(item) is not int or is_named for item in value]
        items = [self.wrap(v, f"{path}.{i}", depth + 1) if wrap[i] else v for i, v in enumerate(value)]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return items if type(value) is list else rebuild_tuple(value, items)

    def _is_own(self, value: Any, depth: int) -> bool:
        """Whether a dict or object is the copy's own, and has no paths yet."""
        if depth and not self._shares_all:
            self._ids |= list_containers(self._modules).keys()
            self._shares_all = True
        return id(value) not in self._ids


def _is_foreign(value: Any) -> bool:
    """Whether a value is of a class of timm, which is no configuration of a user."""
    return type(value).__module__.partition(".")[0] == "timm"
