"""The user's rules of a search space: least widths, divisors and choices, for all groups or by glob."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from timm_autoslim.errors import WidthError
from timm_autoslim.supernet.space import ChannelGroup, SearchSpace, check_mapping
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.utils.arguments import as_integer

# AutoSlim lets every layer go down to about 0.15 of its channels (arXiv 1903.11728, section 4).
DEFAULT_MIN = 0.15
# Widths are multiples of 8 channels as in the paper, or of fewer where a group would have less than this many steps.
DEFAULT_STEPS = 8


Rule = Mapping[str, Any]


def _match(rules: Rule, name: str, producers: Iterable[str], used: set[str]) -> Any:
    """Return the value of the last glob that matches the group's name or one of its modules."""
    found = None
    for glob, value in rules.items():
        if any(fnmatch.fnmatchcase(path, glob) for path in (name, *producers)):
            used.add(glob)
            found = value
    return found


def default_divisor(size: int, channels: int) -> int:
    """Return 8 channels in units, or less where the group would have fewer than eight steps."""
    return (
        next((d for d in (8, 4, 2) if d % channels == 0 and size // (d // channels) >= DEFAULT_STEPS), channels)
        // channels
        or 1
    )


def build_space(
    graph: ChannelGraph,
    min: int | float | Rule | None = None,
    divisor: int | Rule | None = None,
    choices: Rule | None = None,
) -> SearchSpace:
    """Make the search space of a graph; `min`, `divisor` and `choices` are one value for all, or values by glob.

    Raises:
        WidthError: a value is out of range, or a glob matches no group.
    """
    rules: dict[str, Rule] = {
        "min": min if isinstance(min, Mapping) else {} if min is None else {"*": min},
        "divisor": divisor if isinstance(divisor, Mapping) else {} if divisor is None else {"*": divisor},
        "choices": {} if choices is None else choices,
    }
    check_mapping("choices", rules["choices"], "{glob: [widths]}")
    used: dict[str, set[str]] = {key: set() for key in rules}
    groups = []
    for index, (name, size) in enumerate(zip(graph.names, graph.group_sizes, strict=True)):
        producers = tuple(dict.fromkeys(p for s in graph.strands if s.group == index for p in s.producers))
        count = graph.producers.get(name)
        channels = next((f for g, f in count.terms if g == index), 1) if count else 1
        given = {key: _match(rules[key], name, producers, used[key]) for key in rules}
        groups.append(_group(name, size, channels, producers, graph.floors[index], given))
    for key, rule in rules.items():
        for glob in rule:
            if glob not in used[key]:
                raise WidthError(
                    f"{key}={{{glob!r}: ...}}: the glob matches no group; the groups are {list(graph.names[:8])}..."
                )
    return SearchSpace(graph, groups)


def _group(
    name: str, size: int, channels: int, producers: tuple[str, ...], floor: int, given: Mapping[str, Any]
) -> ChannelGroup:
    divisor = as_integer(default_divisor(size, channels) if given["divisor"] is None else given["divisor"])
    if divisor is None or divisor < 1:
        raise WidthError(f"{name}: got the divisor {given['divisor']!r}; needed: an integer of at least 1")
    least = DEFAULT_MIN if given["min"] is None else given["min"]
    if isinstance(least, float):
        lowest = max(round(least * size), floor) if 0 < least <= 1 else None
    else:
        lowest = as_integer(least)
    if lowest is None or not floor <= lowest <= size:
        raise WidthError(
            f"{name}: got min={given['min']!r}; needed: an integer from {floor} to {size}, "
            "or a share above 0 and at most 1"
        )
    first = -(-lowest // divisor) * divisor
    steps = [*range(first, size, divisor), size] if given["choices"] is None else given["choices"]
    if not isinstance(steps, Iterable) or isinstance(steps, (str, bytes)) or not (steps := list(steps)):
        raise WidthError(f"{name}: got choices={given['choices']!r}; needed: a list of at least one width")
    bare = ChannelGroup(name, size, lowest, divisor, (), channels, producers, floor)
    chosen = sorted({*map(bare.checked, steps), size})  # the widest is always a subnet
    return replace(bare, choices=tuple(chosen))
