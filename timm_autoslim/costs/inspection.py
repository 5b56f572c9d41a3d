"""What can be slimmed in a model: its groups, its reach, and what is fixed and why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from timm_autoslim.costs.cost import cost_by_module
from timm_autoslim.costs.reach import Reach, reach
from timm_autoslim.supernet.convert import convert
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import ChannelGroup


@dataclass(frozen=True)
class Fixed:
    """Axes that stay as they are for one reason.

    Attributes:
        reason: why.
        count: how many axes.
        name, axis: one of them, the name of its tensor and its number.

    Example:
        >>> Fixed("an output of the model", 2, "fc.weight", 0).count
        2
    """

    reason: str
    count: int
    name: str
    axis: int


@dataclass(frozen=True)
class Inspection:
    """What can be slimmed in a model; as a text it is what `python -m timm_autoslim inspect` prints.

    Attributes:
        groups: the groups of channels that share one width.
        reach: how far the model can be narrowed, and what stands in the way.
        fixed: what stays as it is, the most frequent reason first.
        constants: numbers in the forward that stay as they are at all widths.
        macs_by_module: the MACs of each module at full and at half width.
        seconds: how long tracing and proving took.
        table: the groups as a table.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import inspect
        >>> found = inspect(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> len(found.groups), found.fixed[0].count > 0
        (10, True)
    """

    groups: tuple[ChannelGroup, ...]
    reach: Reach
    fixed: tuple[Fixed, ...]
    constants: tuple[str, ...]
    macs_by_module: Mapping[str, tuple[int, int]] = field(hash=False, repr=False)
    seconds: float = field(compare=False)
    table: str = field(compare=False, repr=False)

    def __str__(self) -> str:
        """Return the table of groups, the reach, and what is fixed."""
        limits = self.reach
        lines = [self.table, "", "reach (a quarter at half width is ideal):"]
        for text, cost in (("half", limits.half), ("minimum", limits.narrowest)):
            lines.append(
                f"  at {text} width {cost.macs / limits.widest.macs:.2%} of the MACs "
                f"and {cost.params / limits.widest.params:.2%} of the parameters"
            )
        lines += [f"  {share:6.2%} of the MACs held by: {reason}" for reason, share in limits.obstacles[:5]]
        lines += ["", "fixed axes, and why:"]
        lines += [f"{one.count:5}  {one.reason}  (such as axis {one.axis} of {one.name})" for one in self.fixed]
        if self.constants:
            lines += ["", "numbers that stay as they are at all widths:", *(f"  {text}" for text in self.constants)]
        return "\n".join(lines)

    def list_modules(self) -> str:
        """Return a table of the MACs of all modules."""
        lines = [f"{'MACs':>14} {'at half':>14}  module"]
        return "\n".join([*lines, *(f"{a:14,} {b:14,}  {path}" for path, (a, b) in self.macs_by_module.items())])

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        groups = [{**asdict(g), "choices": [*g.choices], "producers": [*g.producers]} for g in self.groups]
        costs = {name: getattr(self.reach, name).to_dict() for name in ("widest", "half", "narrowest")}
        obstacles = [{"reason": reason, "share_of_macs": share} for reason, share in self.reach.obstacles]
        modules = {path: {"macs": a, "macs_at_half": b} for path, (a, b) in self.macs_by_module.items()}
        return {
            "groups": groups, **costs, "obstacles": obstacles, "fixed": [asdict(one) for one in self.fixed],
            "constants": [*self.constants], "modules": modules, "seconds": self.seconds,
        }  # fmt: skip


def inspect(model: nn.Module, example_input: Any = None) -> Inspection:
    """Return what can be slimmed in a model, how far, and what is fixed and why. The model is not changed.

    Args:
        model: any model; on the meta device too.
        example_input: as for `convert`.

    Raises:
        TraceError: the model cannot be traced.
        NothingToSlimError: no channel of it can be removed.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import inspect
        >>> found = inspect(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> round(found.reach.half.macs / found.reach.widest.macs, 2)
        0.25
    """
    start = time.perf_counter()
    supernet = convert(model, example_input)
    seconds = time.perf_counter() - start
    space = supernet.space
    half = cost_by_module(supernet, space.uniform(0.5))
    modules = {path: (macs, half[path]) for path, macs in cost_by_module(supernet).items()}
    return Inspection(
        space.groups, reach(supernet), _list_fixed(supernet), supernet.constants, modules, seconds, space.table()
    )


def _list_fixed(supernet: Supernet) -> tuple[Fixed, ...]:
    """Return what is fixed, by reason."""
    places = supernet.graph.fixed
    first = {reason: place for place, reason in reversed(list(places.items()))}
    return tuple(Fixed(reason, count, *first[reason]) for reason, count in Counter(places.values()).most_common())
