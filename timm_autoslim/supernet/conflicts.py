"""Rules of a search space that contradict each other: which one wins, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from timm_autoslim.supernet.rules import find_width, read_share
from timm_autoslim.supernet.space import SearchSpace
from timm_autoslim.supernet.widths import ChannelGroup
from timm_autoslim.utils.globs import matches

_SHOWN = 3  # groups that are named


@dataclass(frozen=True)
class _Rule:
    """One value that a user gave for the groups of a glob, or for all.

    Attributes:
        argument: of `convert`: min, divisor or choices.
        glob: the glob; None where the value is for all.
        value: the value.
        groups: names of the groups that it matches.
    """

    argument: str
    glob: str | None
    value: Any
    groups: frozenset[str]

    def __str__(self) -> str:
        return (
            f"{self.argument}={self.value!r}" if self.glob is None else f"{self.argument} {self.glob!r}: {self.value!r}"
        )

    def refines(self, other: _Rule) -> bool:
        """Whether it is for some groups of another rule, and so is an exception from it."""
        return self.groups < other.groups


def list_conflicts(space: SearchSpace) -> list[str]:
    """Return what contradicts what among the rules that a search space was made by, and which rule wins.

    Of two globs of one argument the later wins; `choices` win over `min` and `divisor`. A rule for some of the groups
    of another is an exception from it, and no conflict where it wins.
    """
    rules = {argument: list(_list_rules(space, argument)) for argument in space.rules}
    texts = [text for of_one in rules.values() for pair in combinations(of_one, 2) if (text := _compare(*pair))]
    for choices in rules.get("choices", ()):
        for other in (*rules.get("min", ()), *rules.get("divisor", ())):
            if not choices.refines(other):
                texts += _list_left_out(space, choices, other)
    return texts


def _list_rules(space: SearchSpace, argument: str) -> Iterator[_Rule]:
    rule = space.rules[argument]
    if isinstance(rule, Mapping):
        for glob, value in rule.items():
            names = (g.name for g in space.groups if any(matches(path, glob) for path in (g.name, *g.producers)))
            yield _Rule(argument, glob, value, frozenset(names))
    elif rule is not None:
        yield _Rule(argument, None, rule, frozenset(space.names))


def _compare(earlier: _Rule, later: _Rule) -> str:
    """Say what two globs of one argument contradict each other in; nothing where the later is an exception."""
    both = earlier.groups & later.groups
    if not both or later.refines(earlier) or _are_equal(earlier.value, later.value):
        return ""
    if earlier.groups <= later.groups:
        return (
            f"{earlier} has no effect: {later} comes later, matches all of its groups ({_name(both)}) and wins; put "
            "the glob of more groups first, or leave one out"
        )
    return (
        f"{earlier} and {later} both match {_name(both)}: the later one wins; name these groups by a glob of their own"
    )


def _list_left_out(space: SearchSpace, choices: _Rule, other: _Rule) -> Iterator[str]:
    """Yield what choices a `min` or a `divisor` would leave out."""
    wrong: dict[str, int] = {}  # by group, the first such choice
    for name in sorted(choices.groups & other.groups, key=space.names.index):
        group = space[name]
        if widths := [width for width in group.choices[:-1] if not _allows(other, group, width)]:
            wrong[name] = widths[0]
    if wrong:
        name, width = next(iter(wrong.items()))
        lack = "is below the least width" if other.argument == "min" else "is no multiple"
        yield (
            f"{choices} and {other} contradict each other in {_name(wrong)} (the width {width} of {name} {lack}): "
            "choices win; leave one of the two out"
        )


def _allows(rule: _Rule, group: ChannelGroup, width: int) -> bool:
    if rule.argument == "divisor":
        return width % int(rule.value) == 0
    return bool(width >= find_width(rule.value, group.size, group.floor))


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str) and not isinstance(b, str):
        return len(a) == len(b) and all(map(_are_equal, a, b))
    return bool((read_share(a) or a) == (read_share(b) or b))


def _name(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
