"""The search space of a supernet: all widths that its channel groups may have."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch

from timm_autoslim.errors import WidthError
from timm_autoslim.supernet.widths import ChannelGroup, Widths, hash_groups, make_group_error
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.utils.amounts import write_amount
from timm_autoslim.utils.arguments import as_integer, check_flag, check_integer
from timm_autoslim.utils.html import make_html_table


def check_mapping(name: str, value: object, example: str) -> None:
    """Raise WidthError if the argument of this name is no mapping; `example` shows one, such as {group: width}."""
    if not isinstance(value, Mapping):
        raise WidthError.at(name, got=f"a {type(value).__name__}", needed=f"a dict {example}")


def _spread(choices: Sequence[int], steps: int) -> Sequence[int]:
    """Return the first choice, the last, and those between that cut the range into so many equal steps."""
    steps, last = check_integer("steps", steps, WidthError), len(choices) - 1
    return [choices[round(i * last / steps)] for i in range(steps + 1)] if last > steps else choices


def draw_numbers(n: int, generator: torch.Generator | None) -> list[float]:
    """Return n random numbers, from 0 to below 1.

    Raises:
        WidthError: the generator is no `torch.Generator`.
    """
    if not isinstance(generator, (torch.Generator, type(None))):
        needed = "a torch.Generator, such as torch.Generator().manual_seed(5), or None for torch's default"
        raise WidthError.at("generator", got=repr(generator), needed=needed)
    numbers: list[float] = torch.rand(n, generator=generator).tolist()
    return numbers


def describe_dropped(graph: ChannelGraph) -> str:
    """Return what the forward runs though no output depends on it, and what to do; empty if there is nothing."""
    if not graph.dropped:
        return ""
    sizes = {name: prod(graph.shapes[name]) for name in graph.parameters}
    share = sum(sizes[name] for name in graph.observations.dropped) / sum(sizes.values())
    names = f"{', '.join(graph.dropped[:3])}{', ...' if len(graph.dropped) > 3 else ''}"
    return (
        f"no output depends on {share:.0%} of the parameters ({names}), though forward runs them: delete these modules "
        "before convert, or budgets are met by narrowing them"
    )


class SearchSpace:
    """All subnets of a supernet.

    Attributes:
        groups: the channel groups, in the order in which the model produces their channels.
        names: their names.
        id: the same for every supernet whose groups have these names and sizes.
        rules: `min`, `divisor` and `choices` as the user gave them; None is the default.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> space = supernet.space
        >>> len(space), space.names[:2]
        (10, ('conv1.0', 'conv1.3'))
        >>> for line in str(space).splitlines()[-3:]:
        ...     print(line)
        min          1.0M MACs (  4.6%)      0.13M params (  2.6%)
        half         5.6M MACs ( 25.2%)      1.23M params ( 25.1%)
        max         22.4M MACs (100.0%)      4.93M params (100.0%)
    """

    def __init__(
        self, graph: ChannelGraph, groups: Sequence[ChannelGroup], rules: Mapping[str, Any] | None = None
    ) -> None:
        self._graph = graph
        self.groups = tuple(groups)
        self.rules = dict(rules or {})
        self.names = tuple(g.name for g in self.groups)
        self._index = {name: i for i, name in enumerate(self.names)}
        self.id = hash_groups(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        try:
            return self.groups[self._index[name]]
        except (KeyError, TypeError):  # a list, for one, cannot be looked up
            raise make_group_error(name, self.names) from None

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._index

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        rows = [(g.name, g.size, g.choices[0], g.divisor, g.channels) for g in self.groups]
        return make_html_table(["group", "width", "least width", "divisor", "channels in all"], rows)

    def _make_widths(self, values: Iterable[int]) -> Widths:
        return Widths(tuple(values), self.groups, self.id)

    def check(self, widths: Widths) -> Widths:
        """Return `widths`, or raise WidthError if they are of another search space."""
        if not isinstance(widths, Widths):
            needed = "Widths, from supernet.space.from_dict({name: width}), .uniform(ratio), .max() and so on"
            raise WidthError.at("widths", got=f"a {type(widths).__name__}", needed=needed)
        if widths.space_id != self.id:
            raise WidthError.at(
                "widths",
                got=f"widths of another model ({len(widths)} groups, space {widths.space_id})",
                needed=f"widths of this space ({len(self)} groups, {self.id})",
                remedy="make them with the methods of this space",
            )
        return widths

    def max(self) -> Widths:
        """Return the widths of the widest subnet."""
        return self._make_widths(g.size for g in self.groups)

    def min(self) -> Widths:
        """Return the narrowest widths that are sampled and searched."""
        return self._make_widths(g.choices[0] for g in self.groups)

    def uniform(self, ratio: float, exact: bool = False) -> Widths:
        """Return the widths of one multiplier for all groups, rounded to the nearest choice (or, if exact, to a unit).

        Raises:
            WidthError: the ratio is not above 0 and at most 1.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> space = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)).space
            >>> space.uniform(0.3)["layer1.0.conv1"], space.uniform(0.3, exact=True)["layer1.0.conv1"]
            (16, 19)
        """
        if not isinstance(ratio, numbers.Real) or isinstance(ratio, bool) or not 0 < ratio <= 1:
            raise WidthError.at("ratio", got=repr(ratio), needed="a number above 0 and at most 1")
        check_flag("exact", exact, WidthError)
        if exact:
            return self._make_widths(max(g.choices[0], round(ratio * g.size)) for g in self.groups)
        return self._make_widths(min(g.choices, key=lambda c: (abs(c - ratio * g.size), -c)) for g in self.groups)

    def sample(self, generator: torch.Generator | None = None, steps: int | None = None) -> Widths:
        """Return random widths, drawn for each group independently (AutoSlim's non-uniform sampling, arXiv 1903.11728).

        Args:
            generator: of torch, on the CPU; None is torch's own.
            steps: how many steps there are between the widths of a group that are drawn from, evenly spread over its
                choices; None draws from all choices. On a GPU every new width costs time (`SAMPLERS`).

        Raises:
            WidthError: the generator is no `torch.Generator`, or `steps` no positive integer.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> space = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)).space
            >>> widths = space.sample(torch.Generator().manual_seed(0))
            >>> all(width in group.choices for group, width in zip(space.groups, widths.values()))
            True
        """
        numbers = draw_numbers(len(self.groups), generator)
        choices = [g.choices if steps is None else _spread(g.choices, steps) for g in self.groups]
        return self._make_widths(c[int(u * len(c))] for u, c in zip(numbers, choices, strict=True))

    def sample_multiplier(self, generator: torch.Generator | None = None) -> Widths:
        """Return the widths of one random multiplier for all groups, as `uniform` does (US-Nets, arXiv 1903.05134).

        The multiplier is uniform between 1 and the least share that any group can have. A group that cannot be as
        narrow has its narrowest choice.

        Raises:
            WidthError: the generator is no `torch.Generator`.
        """
        least = min((g.choices[0] / g.size for g in self.groups), default=1.0)
        return self.uniform(min(1.0, least + (1 - least) * draw_numbers(1, generator)[0]))

    def from_dict(self, widths: Mapping[str, int]) -> Widths:
        """Return the widths in a dict: for every group an integer from its floor to its size.

        Raises:
            WidthError: a group is missing or unknown, or a width is no integer or out of range.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> space = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)).space
            >>> widths = space.from_dict({**space.max().to_dict(), "layer1.0.conv1": 13})
            >>> space.from_dict(widths.to_dict()) == widths
            True
        """
        check_mapping("widths", widths, "{group: width}")
        for name in widths:
            if name not in self._index:
                raise make_group_error(name, self.names)
        missing = [n for n in self.names if n not in widths]
        if missing:
            got = f"no width ({len(missing)} of {len(self)} are missing)"
            raise WidthError.at(missing[0], got=got, needed="a width for every group")
        return self._make_widths(widths[g.name] for g in self.groups)

    def from_channels(self, channels: Mapping[str, int]) -> Widths:
        """Return widths from the number of channels of some modules; all other groups are at their widest.

        Args:
            channels: by the path of a module that produces channels, the number of its channels.

        Raises:
            WidthError: a module produces no channels that can be removed, a number is no integer or out of range, or
                the numbers of two modules of one group contradict each other.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> space = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)).space
            >>> widths = space.from_channels({"layer1.0.conv1": 10})
            >>> widths["layer1.0.conv1"], widths["layer2.0.conv1"]
            (10, 128)
        """
        check_mapping("channels", channels, "{module: channels}")
        values: dict[int, tuple[int, str]] = {}
        for path, number in channels.items():
            group, width = self._find_width(path, number)
            if values.get(group, (width, ""))[0] != width:
                other = values[group][1]
                got = f"{number} channels, where {other} has {channels[other]}"
                raise WidthError.at(
                    path, got=got, needed=f"numbers that agree: both are the group {self.names[group]!r}"
                )
            values[group] = (width, path)
        return self._make_widths(values[i][0] if i in values else g.size for i, g in enumerate(self.groups))

    def _find_width(self, path: str, channels: int) -> tuple[int, int]:
        """Return the group of a module's channels, and the width at which it has this number of them."""
        count = self._graph.producers.get(path)
        if count is None:
            needed = f"a module that produces channels: {list(self._graph.producers)[:8]}..."
            raise WidthError.at(path, got="a module that produces no channels", needed=needed)
        if not count.terms:
            got = f"a module whose {count.fixed} channels are fixed ({self._graph.find_reason(path)})"
            raise WidthError.at(path, got=got, needed="a module whose channels can be removed")
        if len(count.terms) > 1:
            got = f"a module whose channels belong to the groups {[self.names[g] for g, _ in count.terms]}"
            raise WidthError.at(path, got=got, needed="a module whose channels are one group", remedy="use from_dict")
        (index, factor), fixed = count.terms[0], count.fixed
        group, number = self.groups[index], as_integer(channels)
        width, rest = divmod(-1 if number is None else number - fixed, factor)
        if number is None or rest or not group.floor <= width <= group.size:
            needed = f"an integer from {fixed + factor * group.floor} to {fixed + factor * group.size}"
            needed += f" in steps of {factor}" if factor > 1 else ""
            raise WidthError.at(path, got=f"{channels!r} channels", needed=needed)
        return index, width

    def channels(self, widths: Widths) -> dict[str, int]:
        """Return the number of channels of every module that produces channels, at these widths.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> space = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32)).space
            >>> space.channels(space.min())["fc"], space.channels(space.min())["layer1.0.conv2"]
            (10, 16)
        """
        values = self.check(widths).values_
        return {path: count(values) for path, count in self._graph.producers.items()}

    def list_floor_reasons(self) -> dict[str, str]:
        """Return, for every group whose least width the model's code decides, why: by name, with the line of the code.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> convert(timm.create_model("resnet10t"), torch.zeros(1, 3, 32, 32)).space.list_floor_reasons()
            {}
        """
        return {self.names[group]: reason for group, reason in sorted(self._graph.floor_reasons.items())}

    def table(self) -> str:
        """Return a table of the groups, with the MACs and parameters of the subnets at min, half and max.

        Where the model's code asks about the width of a group, the least width and the line of the code follow, and so
        do modules that no output depends on.
        """
        rows = [("group", "size", "min", "divisor", "choices", "modules")]
        for g in self.groups:
            rows.append(
                (g.name, str(g.size), str(g.choices[0]), str(g.divisor), str(len(g.choices)), str(len(g.producers)))
            )
        columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, columns, strict=True)))
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.append("-" * len(lines[0]))
        graph, widest = self._graph, self._graph.group_sizes
        for name, widths in (("min", self.min()), ("half", self.uniform(0.5)), ("max", self.max())):
            macs, params = graph.macs(widths.values_), graph.params(widths.values_)
            lines.append(
                f"{name:<5} {write_amount(macs, 1):>11} MACs ({macs / graph.macs(widest):6.1%})  "
                f"{write_amount(params, 2):>9} params ({params / graph.params(widest):6.1%})"
            )
        reasons = self.list_floor_reasons()
        lines += ["", "least widths, and why:"] if reasons else []
        lines += [f"  {name}: {self[name].floor}, {reason}" for name, reason in reasons.items()]
        lines += ["", dropped] if (dropped := describe_dropped(graph)) else []
        return "\n".join(lines)
