"""Where sizes enter a trace: the attributes of modules, and the arguments of torch functions."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timm_autoslim.tracing.origins import FromAttribute
from timm_autoslim.tracing.sizes import Size


@dataclass
class FunctionCall:
    """A call of a torch function, with the arguments as the model's code wrote them."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def _list_sizes(self) -> list[list[int]]:
        """Return every list of integers among the arguments, and last all arguments that are integers themselves."""
        lists: list[list[int]] = []
        integers: list[int] = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, (tuple, list)) and value and all(isinstance(v, int) for v in value):
                lists.append(list(value))
            elif isinstance(value, int) and not isinstance(value, bool):
                integers.append(value)
        return [*lists, integers]

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


def _wrap_integers(value: Any, path: str) -> Any:
    if type(value) is int:
        return Size(value, FromAttribute(path))
    if type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        return type(value)(Size(v, FromAttribute(f"{path}.{i}")) for i, v in enumerate(value))
    return value


def wrap_attributes(model: nn.Module, shared: Set[int] = frozenset()) -> None:
    """Give every integer attribute of every module, also in tuples and lists, its path as the origin.

    So do those of objects and dicts that modules hold, such as configurations. One that several modules hold has the
    path of the first.

    Args:
        model: a meta copy.
        shared: ids of objects that are not the copy's own, and stay as they are.
    """
    ids = set(shared)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in list(module.__dict__.items()):
            if name.startswith("_"):
                continue
            module.__dict__[name] = _wrap_integers(value, prefix + name)
            members = _find_members(name, value)
            if members is not None and id(value) not in ids:
                ids.add(id(value))
                for key, member in list(members.items()):
                    if isinstance(key, str) and key.isidentifier():
                        members[key] = _wrap_integers(member, f"{prefix}{name}.{key}")


def _find_members(name: str, value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, or the dict, if it may be a configuration."""
    if type(value) is dict:
        return value
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value) or package in ("torch", "timm", "builtins"):
        return None
    members = getattr(value, "__dict__", None)
    return members if type(members) is dict else None
