"""Build a search space by the user's rules: least widths, divisors and choices, for all groups or by glob."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

from timm_autoslim.errors import WidthError
from timm_autoslim.supernet.space import SearchSpace
from timm_autoslim.supernet.widths import ChannelGroup
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.utils.arguments import as_integer
from timm_autoslim.utils.globs import describe_near, matches

# AutoSlim lets every layer go down to about 0.15 of its channels (arXiv 1903.11728, section 4).
DEFAULT_MIN = 0.15
# Widths are multiples of 8 channels as in the paper, or of fewer where a group would have less than this many steps.
DEFAULT_STEPS = 8
# Why channels are fixed that a glob of the user freezes.
FROZEN = "frozen by the user ({})"

ByGlob = Mapping[str, Any]

_SHARE = 'a share above 0 and at most 1, such as 0.25 or "25%"'


def _find_value(rule: ByGlob, name: str, producers: Iterable[str], matching_globs: set[str]) -> Any:
    """Return the value of the last glob that matches a group by its name or its modules; None if none does.

    Every glob that matches is added to `matching_globs`.
    """
    result = None
    for glob, value in rule.items():
        if any(matches(path, glob) for path in (name, *producers)):
            matching_globs.add(glob)
            result = value
    return result


def choose_divisor(size: int, channels: int) -> int:
    """Return the default divisor in units: that of 8 channels, or of fewer if there would be less than eight steps."""
    return (
        next((d for d in (8, 4, 2) if d % channels == 0 and size // (d // channels) >= DEFAULT_STEPS), channels)
        // channels
        or 1
    )


def build_space(
    graph: ChannelGraph,
    min: int | float | str | ByGlob | None = None,
    divisor: int | ByGlob | None = None,
    choices: Sequence[Any] | ByGlob | None = None,
) -> SearchSpace:
    """Return the search space of a graph; `min`, `divisor` and `choices` are one value for all, or values by glob.

    Where several globs of one argument match a group, the last of them wins; `choices` win over `min` and `divisor`.

    Raises:
        WidthError: a value is out of range, or a glob matches no group.
    """
    arguments = {"min": min, "divisor": divisor, "choices": choices}
    rules: dict[str, ByGlob] = {
        key: rule if isinstance(rule, Mapping) else {} if rule is None else {"*": rule}
        for key, rule in arguments.items()
    }
    matching_globs: dict[str, set[str]] = {key: set() for key in rules}
    groups, order = [], {path: position for position, path in enumerate(graph.producers)}
    for index, (name, size) in enumerate(zip(graph.names, graph.group_sizes, strict=True)):
        paths = {path for strand in graph.strands if strand.group == index for path in strand.producers}
        producers = tuple(sorted(paths, key=order.__getitem__))
        count = graph.producers.get(name)
        channels = next((f for g, f in count.terms if g == index), 1) if count else 1
        values = {key: _find_value(rules[key], name, producers, matching_globs[key]) for key in rules}
        groups.append(_build_group(name, size, channels, producers, graph.floors[index], values))
    for key, rule in rules.items():
        for glob in rule:
            if glob not in matching_globs[key]:
                names = dict.fromkeys((*graph.names, *(p for group in groups for p in group.producers)))
                raise _make_glob_error(graph, key, str(glob), names)
    return SearchSpace(graph, groups, arguments)


def _make_glob_error(graph: ChannelGraph, rule: str, glob: str, paths: Iterable[str]) -> WidthError:
    """Return the error for a glob that matches no group; it may match modules whose channels are fixed."""
    needed = "globs of group names or their modules"
    reasons = Counter(reason for (name, _), reason in graph.fixed.items() if matches(name.rpartition(".")[0], glob))
    if not reasons:
        got = f"a glob ({glob!r}) that matches no group"
        return WidthError.at(rule, got=got, needed=needed, remedy=describe_near(glob, paths))
    texts = [reason for reason in reasons if reason.startswith(FROZEN.partition("{}")[0])]
    texts = texts or [reason for reason, _ in reasons.most_common(2)]
    got = f"a glob ({glob!r}) that matches modules whose channels are all fixed ({'; '.join(texts)})"
    return WidthError.at(rule, got=got, needed=needed, remedy=f"leave it out: {rule} says nothing of fixed channels")


def _build_group(
    name: str, size: int, channels: int, producers: tuple[str, ...], floor: int, values: Mapping[str, Any]
) -> ChannelGroup:
    """Return a group with its choices; `values` are those of the user's rules, None where there is none."""
    divisor = as_integer(choose_divisor(size, channels) if values["divisor"] is None else values["divisor"])
    if divisor is None or divisor < 1:
        raise WidthError.at(name, got=f"divisor={values['divisor']!r}", needed="an integer of at least 1")
    least = DEFAULT_MIN if values["min"] is None else values["min"]
    lowest = find_width(least, size, floor)
    if lowest is None or not floor <= lowest <= size:
        raise WidthError.at(name, got=f"min={least!r}", needed=f"an integer from {floor} to {size}, or {_SHARE}")
    first = -(-lowest // divisor) * divisor
    steps = [*range(first, size, divisor), size] if values["choices"] is None else values["choices"]
    if not isinstance(steps, Iterable) or isinstance(steps, (str, bytes)) or not (steps := list(steps)):
        needed = "a list of at least one width or share"
        raise WidthError.at(name, got=f"choices={values['choices']!r}", needed=needed)
    group = ChannelGroup(name, size, lowest, divisor, (), channels, producers, floor)
    choices = sorted({*(_read_choice(group, step) for step in steps), size})  # the widest is always a subnet
    return replace(group, choices=tuple(choices))


def _read_choice(group: ChannelGroup, choice: Any) -> int:
    """Return a width of a group that a user gave as a number or as a share.

    Raises:
        WidthError: it is neither, or is out of range.
    """
    if share := read_share(choice):
        return max(group.floor, round(share * group.size))
    if as_integer(choice) is None:
        needed = f"an integer from {group.floor} to {group.size}, or {_SHARE}"
        raise WidthError.at(group.name, got=f"the width {choice!r}", needed=needed)
    return group.check_width(choice)


def find_width(value: Any, size: int, floor: int) -> Any:
    """Return the width of a group of some size and floor that a number or a share is; None if it is neither."""
    return max(floor, round(share * size)) if (share := read_share(value)) else as_integer(value)


def read_share(value: Any) -> float | None:
    """Return a share that is written as a float or as a text of per cent; None for anything else."""
    try:
        share = float(value.strip().removesuffix("%")) / 100 if isinstance(value, str) and "%" in value else value
    except ValueError:
        return None
    real = isinstance(share, Real) and not isinstance(share, Integral)  # numpy's too
    return float(share) if real and 0 < share <= 1 else None
