"""What can be slimmed in a model: its groups, its reach, and what is fixed and why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from timm_autoslim.costs.cost import cost_by_module
from timm_autoslim.costs.reach import Reach, reach
from timm_autoslim.supernet.convert import check_rules, convert
from timm_autoslim.supernet.space import describe_dropped
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import ChannelGroup
from timm_autoslim.tracing.solve import OUTPUT, UNUSED
from timm_autoslim.tracing.trace import GOOD_SHARE


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
        advice: what would let more shrink.
        least_widths: by group, the line of the code that decides its least width.
        seconds: how long tracing and proving took.
        table: the groups as a table.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import inspect
        >>> inspection = inspect(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> len(inspection.groups), inspection.fixed[0].count > 0
        (10, True)
    """

    groups: tuple[ChannelGroup, ...]
    reach: Reach
    fixed: tuple[Fixed, ...]
    constants: tuple[str, ...]
    macs_by_module: Mapping[str, tuple[int, int]] = field(hash=False, repr=False)
    advice: tuple[str, ...]
    least_widths: Mapping[str, str] = field(hash=False)
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
        lines += ["", "what would help:", *(f"  {text}" for text in self.advice)] if self.advice else []
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
            "least_widths": dict(self.least_widths),
            "constants": [*self.constants], "advice": [*self.advice], "modules": modules, "seconds": self.seconds,
        }  # fmt: skip


def inspect(model: nn.Module, example_input: Any = None, **rules: Any) -> Inspection:
    """Return what can be slimmed in a model, how far, and what is fixed and why. The model is not changed.

    Args:
        model: any model; on the meta device too.
        example_input: as for `convert`.
        **rules: further arguments of `convert`: `freeze=`, `min=`, `divisor=`, `choices=`, `keep_output=` and
            `whole_heads=`.

    Raises:
        TraceError: the model cannot be traced.
        NothingToSlimError: no channel of it can be removed.
        WidthError: a rule matches nothing, or is out of range.
        TypeError: a rule that `convert` does not have.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import inspect
        >>> inspection = inspect(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> round(inspection.reach.half.macs / inspection.reach.widest.macs, 2)
        0.25
    """
    check_rules("inspect", rules, left_out=("example_input", "order", "batches", "distributed", "base", "base_args"))
    start = time.perf_counter()
    supernet = convert(model, example_input, **rules)
    seconds = time.perf_counter() - start
    space, limits = supernet.space, reach(supernet)
    half = cost_by_module(supernet, space.uniform(0.5))
    modules = {path: (macs, half[path]) for path, macs in cost_by_module(supernet).items()}
    return Inspection(
        groups=space.groups,
        reach=limits,
        fixed=_list_fixed(supernet),
        constants=supernet.constants,
        macs_by_module=modules,
        advice=tuple(_list_advice(supernet, limits)),
        least_widths=space.list_floor_reasons(),
        seconds=seconds,
        table=space.table(),
    )


_MUCH = 0.2  # of the MACs or of the parameters
_SOME = 0.05  # of the MACs, where half width leaves more than the good share of them


def _list_advice(supernet: Supernet, limits: Reach) -> Iterator[str]:
    """Yield what the user may change so that more shrinks."""
    graph, parameters = supernet.graph, dict(supernet.model.named_parameters())
    used = {name for name, axis in graph.places if graph.fixed.get((name, axis)) != UNUSED}
    used |= parameters.keys() - {name for name, _ in graph.places}  # without channels
    unused = [name for name in graph.parameters if name not in used]
    total, count = sum(p.numel() for p in parameters.values()), sum(parameters[name].numel() for name in unused)
    if count > _MUCH * total:
        paths = sorted({name.partition(".")[0] for name in unused} - {name.partition(".")[0] for name in used})
        names = f" ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})" if paths else ""
        yield f"no forward uses {count / total:.0%} of the parameters{names}: delete these modules before convert"
    if dropped := describe_dropped(graph):
        yield dropped
    outputs = sum(share for reason, share in limits.obstacles if reason == OUTPUT)
    half = limits.half.macs / limits.widest.macs
    if outputs > (_MUCH if half <= GOOD_SHARE else _SOME):
        yield (
            f"{outputs:.0%} of the MACs are held by the model's outputs: if they are features that may be narrower, "
            "convert(model, keep_output=False), or keep_output=[...] with the names of those that may not"
        )


def _list_fixed(supernet: Supernet) -> tuple[Fixed, ...]:
    """Return what is fixed, by reason."""
    places = supernet.graph.fixed
    first = {reason: place for place, reason in reversed(list(places.items()))}
    return tuple(Fixed(reason, count, *first[reason]) for reason, count in Counter(places.values()).most_common())
