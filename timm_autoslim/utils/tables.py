"""Extension points: tables of named parts, filled by one decorator and read by library, command line and docs alike."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar, cast

from timm_autoslim.errors import AutoSlimError, ConfigError

T = TypeVar("T")
Part = TypeVar("Part")


class Table(Mapping[str, T]):
    """Parts by exact name, in the order in which they were added.

    Attributes:
        argument: the argument that picks one of them, for messages.

    Example:
        >>> RUNTIMES = Table("runtime")
        >>> @RUNTIMES.add("eager")
        ... def run_eagerly(model):
        ...     return model
        >>> list(RUNTIMES)
        ['eager']
        >>> RUNTIMES.pick("eager") is run_eagerly
        True
    """

    def __init__(self, argument: str, error: type[AutoSlimError] = ConfigError) -> None:
        """Start an empty table; `error` is what `pick` raises."""
        self.argument, self._error = argument, error
        self._parts: dict[str, T] = {}

    def add(self, *names: str) -> Callable[[Part], Part]:
        """Return a decorator that adds what it decorates under these names.

        Raises:
            ValueError: a name is taken.
        """

        def decorate(part: Part) -> Part:
            for name in names:
                if name in self._parts:
                    raise ValueError(f"{self.argument}: got {name!r} twice; needed: names that differ")
                self._parts[name] = cast(T, part)  # it keeps its own type: a function its signature
            return part

        return decorate

    def pick(self, name: object) -> T:
        """Return the part of this name.

        Raises:
            AutoSlimError: of the table's type, there is none; the text says which there are, the nearest first.
        """
        if isinstance(name, str) and name in self._parts:
            return self._parts[name]
        near = difflib.get_close_matches(str(name), self._parts, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else ""
        raise self._error.at(self.argument, got=repr(name), needed=f"one of {list(self)}", remedy=remedy)

    def __getitem__(self, name: str) -> T:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
