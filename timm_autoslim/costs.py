"""What a subnet costs, without a forward pass: functions of the widths that the trace gave."""

from __future__ import annotations

import bisect
import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch

from timm_autoslim.arguments import whole_number
from timm_autoslim.errors import BudgetError, ConfigError, LatencyError
from timm_autoslim.terms import Terms, parameter_terms
from timm_autoslim.tracing.graph import ChannelGraph, Count

if TYPE_CHECKING:
    from timm_autoslim.space import Widths
    from timm_autoslim.supernet import Supernet


class Latency(Protocol):
    """What predicts how long a subnet runs, such as a `LatencyTable`."""

    def predict(self, supernet: Supernet, widths: Widths) -> float:
        """Return milliseconds for one batch."""


@dataclass(frozen=True)
class Conditions:
    """What `peak_bytes` and `latency_ms` are counted for; MACs and parameters depend on none of it.

    Attributes:
        batch_size: images in a batch, for `peak_bytes`.
        dtype: type of weights and activations, for `peak_bytes`; None is that of the model.
        latency: what predicts `latency_ms`, for the device, runtime, batch size and type that it was made for.
    """

    batch_size: int = 1
    dtype: torch.dtype | None = None
    latency: Latency | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", whole_number("batch_size", self.batch_size, BudgetError))
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise BudgetError(
                f"got dtype={self.dtype!r}; needed: a floating point type, such as torch.float16, or None"
            )
        if self.latency is not None and not callable(getattr(self.latency, "predict", None)):
            raise BudgetError(f"got latency={self.latency!r}; needed: what predicts, such as a LatencyTable, or None")


@dataclass(frozen=True)
class _Meter:
    """Where the costs come from that are not read off the graph."""

    supernet: Supernet
    widths: Widths
    conditions: Conditions


def _peak_bytes(meter: _Meter) -> int:
    tape = meter.supernet.tape(meter.conditions.batch_size, meter.conditions.dtype)
    return tape.peak_bytes(meter.widths.values_)


def _latency_ms(meter: _Meter) -> float:
    if meter.conditions.latency is None:
        raise BudgetError(
            "latency_ms is known only for a named device; needed: a LatencyTable, as cost(..., latency=table), or "
            "for a search supernet.conditions = Conditions(latency=table)"
        )
    found = meter.conditions.latency.predict(meter.supernet, meter.widths)
    if not isinstance(found, Real) or not 0 < found < float("inf"):
        raise LatencyError(
            f"{type(meter.conditions.latency).__name__}.predict: got {found!r} at the widths "
            f"{meter.widths.to_dict()}; needed: a positive number of milliseconds"
        )
    return float(found)


@dataclass(frozen=True)
class Cost:
    """Cost of one subnet.

    Attributes:
        macs: multiply-adds of convolutions and matrix products for one image in eval mode; one MAC is one multiply-add;
            no bias, normalisation, activation or pooling (the counting rule of arXiv 1903.11728's tables, less the
            final average pool that its authors add).
        params: number of parameters.
    """

    macs: int
    params: int

    _meter: ClassVar[_Meter | None] = None

    @property
    def peak_bytes(self) -> int:
        """The most memory that inference takes at once: weights, inputs and activations of one batch, in bytes.

        From the lifetimes of the tensors of the model's own forward in eval mode without gradients: views share memory,
        in-place operators take none, and a tensor is freed when Python lets go of it. What a kernel takes and frees
        by itself (workspace) is not counted. Batch size and type are those of `conditions`, see `cost`.

        Raises:
            TraceError: the lifetimes cannot be told, because narrower subnets run other operators.
        """
        return int(self._read("peak_bytes", _peak_bytes))

    @property
    def latency_ms(self) -> float:
        """The milliseconds for one batch, predicted from measured operators by the `conditions`' latency table.

        Raises:
            BudgetError: there is no latency table.
            LatencyError: the table cannot measure here, or what it says is no positive number.
        """
        return float(self._read("latency_ms", _latency_ms))

    def kept(self, units: Iterable[str]) -> Cost:
        """Return this cost to be kept: it knows these units, and no longer holds the supernet that others need."""
        for unit in units:
            getattr(self, unit)
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the supernet out of copies and pickles; what was read before stays known."""
        return {name: value for name, value in self.__dict__.items() if name != "_meter"}

    def _read(self, unit: str, tell: Callable[[_Meter], float]) -> float:
        """Return a cost that is told when it is first asked for, and remembered."""
        if unit not in self.__dict__:  # beside the property of this name, which has the say
            if self._meter is None:
                raise BudgetError(f"this cost is kept without {unit}; call cost(supernet, widths) for {unit}")
            self.__dict__[unit] = tell(self._meter)
        found: float = self.__dict__[unit]
        return found


class _Compiled:
    """MACs and parameters of a graph as arrays."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.products = graph.products
        lengths: dict[Count, int] = {}
        rows = [(1, 1, tuple(lengths.setdefault(c, len(lengths)) for c in p.counts)) for p in self.products]
        self._constants = [p.constant for p in self.products]
        self._macs = Terms(list(lengths), len(graph.group_sizes), rows)
        self._params = parameter_terms(graph, {name: (1, *graph.shapes[name]) for name in graph.parameters})

    def cost(self, widths: Sequence[int]) -> Cost:
        """Return the cost at these widths."""
        macs = self._macs(widths) @ self._constants
        return Cost(round(float(macs)), int(self._params(widths).sum()))


_COMPILED: WeakKeyDictionary[ChannelGraph, _Compiled] = WeakKeyDictionary()


def cost_of(graph: ChannelGraph, widths: Sequence[int]) -> Cost:
    """Return MACs and parameters of a graph at these widths, one for each group."""
    compiled = _COMPILED.get(graph)
    if compiled is None or compiled.products is not graph.products:  # the graph was solved again
        compiled = _COMPILED[graph] = _Compiled(graph)
    return compiled.cost(widths)


def cost(
    supernet: Supernet,
    widths: Widths | None = None,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    latency: Latency | None = None,
) -> Cost:
    """Return the cost of a subnet (the widest if no widths are given), without running it.

    `macs` and `params` are there at once. The first `peak_bytes` at a batch size and type runs a few subnets on the
    meta device, about as long as converting does; all others take less than a millisecond. `latency_ms` needs a table.

    Args:
        supernet: the supernet.
        widths: the subnet.
        batch_size, dtype: for `peak_bytes`; by default those of `supernet.conditions`, one image in the model's type.
        latency: for `latency_ms`; by default that of `supernet.conditions`.

    Raises:
        WidthError: the widths are of another model.
        BudgetError: the batch size is not positive, the type no floating point type, or the latency predicts nothing.
        ConfigError: the model is no supernet.
    """
    check_supernet(supernet)
    widths = supernet.space.check(widths if widths is not None else supernet.space.max())
    usual = supernet.conditions
    conditions = Conditions(
        usual.batch_size if batch_size is None else batch_size,
        usual.dtype if dtype is None else dtype,
        usual.latency if latency is None else latency,
    )
    found = cost_of(supernet.graph, widths.values_)
    object.__setattr__(found, "_meter", _Meter(supernet, widths, conditions))
    return found


def check_supernet(supernet: Any) -> None:
    """Raise ConfigError if this is no supernet."""
    # the room of supernets stands on this one, so that it cannot be asked for here
    if not isinstance(getattr(supernet, "graph", None), ChannelGraph):
        raise ConfigError(
            f"the supernet: got a {type(supernet).__name__}; needed: a Supernet, as convert(model) returns"
        )


def cost_by_module(supernet: Supernet, widths: Widths | None = None) -> dict[str, int]:
    """Return the MACs of every module that multiplies, in the order of execution."""
    values = supernet.space.check(widths if widths is not None else supernet.space.max()).values_
    macs: dict[str, float] = defaultdict(float)
    for product in supernet.graph.products:
        macs[product.path] += product.constant * prod(c(values) for c in product.counts)
    return {path: round(m) for path, m in macs.items()}


@dataclass(frozen=True)
class Reach:
    """How far a model can be slimmed.

    Attributes:
        whole, half, narrowest: cost with every group at its size, at half of it (rounded down), and at its narrowest.
        held: what keeps the MACs at half width above the ideal quarter: reason (numbers in paths are `*`), and its
            share of the whole's MACs; the largest first.
    """

    whole: Cost
    half: Cost
    narrowest: Cost
    held: tuple[tuple[str, float], ...]


def reach(supernet: Supernet) -> Reach:
    """Return how far a model can be slimmed, whatever limits its search space has."""
    graph = supernet.graph
    half = [max(1, n // 2) for n in graph.group_sizes]
    whole = cost(supernet)
    held: dict[str, float] = defaultdict(float)
    for product in graph.products:
        left = prod(c(half) for c in product.counts) - prod(c(graph.group_sizes) for c in product.counts) / 4
        reason = product.held or f"{product.path}: one side of the product is no channel"
        held[re.sub(r"(?<=\.)\d+(?=[.:])", "*", reason)] += product.constant * left / whole.macs
    ranked = sorted(((r, share) for r, share in held.items() if share > 0), key=lambda item: -item[1])
    return Reach(whole, cost_of(graph, half), cost_of(graph, graph.floors), tuple(ranked))


UNITS = ("macs", "params", "peak_bytes", "latency_ms")
_GROWING = ("macs", "params")  # where a group is wider there are no fewer; memory and latency may be less
_RATIOS = [i / 20 for i in range(20, 0, -1)]  # of the uniform subnets that are tried where the narrowest is over budget
FILLED = 0.99  # a budget of which this share is used counts as used up
_SUFFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "": 1.0}
_AMOUNT = re.compile(r"(.*?)(%|[kKMG]|[KMG]i)?", re.DOTALL)


def parse_budget(budget: float | str, whole: float) -> float:
    """Return a budget as a number: 300e6, "500k" or "500K", "300M", "1.2G", "20Mi" (of 1,048,576), "60%" of `whole`.

    Raises:
        BudgetError: the text is no budget, or the number is not positive.
    """
    number: float
    try:
        if isinstance(budget, str):
            found = _AMOUNT.fullmatch(budget.strip())
            assert found is not None
            number = float(found[1])
            number = number / 100 * whole if found[2] == "%" else number * _SUFFIXES[found[2] or ""]
        elif isinstance(budget, Real) and not isinstance(budget, bool):
            number = float(budget)
        else:
            raise TypeError
    except OverflowError:
        number = float("inf")
    except (TypeError, ValueError):
        raise BudgetError(f'got the budget {budget!r}; needed: a number, "300M", "1.2G" or "60%"') from None
    if not 0 < number < float("inf"):
        raise BudgetError(f"got the budget {repr(budget)[:40]}; needed: a positive number")
    return number


def check_unit(unit: str) -> str:
    """Return `unit`, or raise BudgetError if there is no such cost."""
    if unit not in UNITS:
        raise BudgetError(f"got a budget in {unit!r}; needed: one of {list(UNITS)}")
    return unit


@dataclass(frozen=True)
class Budget:
    """The upper limits that one network must keep, in one unit or in several; all of them must hold.

    Attributes:
        limits: unit and limit, each unit once.
    """

    limits: tuple[tuple[str, float], ...]

    def exceeded(self, spent: Cost) -> tuple[tuple[str, float], ...]:
        """Return the limits that this cost is above."""
        return tuple((unit, limit) for unit, limit in self.limits if not getattr(spent, unit) <= limit)

    def holds(self, spent: Cost) -> bool:
        """Whether this cost is above none of the limits."""
        return not self.exceeded(spent)

    def tightest(self, spent: Cost) -> tuple[str, float]:
        """Return the limit of which this cost is the largest share."""
        return max(self.limits, key=lambda item: float(getattr(spent, item[0])) / item[1])

    def used(self, spent: Cost) -> float:
        """Return the largest share of any limit that this cost is; at most 1 if the budget holds."""
        unit, limit = self.tightest(spent)
        return float(getattr(spent, unit)) / limit


Amount = float | str
Budgets = Mapping[str, Amount | Sequence[Amount]] | Sequence[str]
_LIMIT = re.compile(r"\s*(\w+)\s*<=(.*)")


def parse_limits(text: str, whole: Cost) -> Budget:
    """Return the budget that a text such as "macs<=300M and params<=40%" names; per cent are of `whole`.

    Raises:
        BudgetError: the text is not of this form, a unit is unknown or named twice, or an amount is malformed.
    """
    limits: dict[str, float] = {}
    for part in re.split(r"\sand\s", text) if isinstance(text, str) else [""]:
        found = _LIMIT.fullmatch(part)
        if found is None:
            raise BudgetError(
                f"got the budget {text!r}; needed: a text of UNIT<=AMOUNT joined by `and`, such as "
                f'"macs<=300M and params<=2M", units {list(UNITS)}'
            )
        unit = check_unit(found[1])
        if unit in limits:
            raise BudgetError(f"got the budget {text!r}, which limits {unit} twice; name every unit once")
        limits[unit] = parse_budget(found[2], getattr(whole, unit))
    return Budget(tuple(limits.items()))


def read_budgets(supernet: Supernet, budgets: Budgets) -> list[Budget]:
    """Read and validate budgets, and order them as a descent meets them: the largest share of the whole first.

    Args:
        supernet: per cent are of its widest subnet.
        budgets: by unit (one of `UNITS`), a number, a text such as "300M" or "60%", or a list of them, each a budget of
            its own; or a list of texts such as "macs<=300M and params<=2M", where all limits of one text must hold.

    Raises:
        BudgetError: a budget is malformed or out of reach, see `within_reach`.
    """
    whole = cost(supernet)
    found: list[Budget] = []
    if isinstance(budgets, Mapping) and budgets:
        for unit, values in budgets.items():
            size = getattr(whole, check_unit(unit))
            for value in [values] if isinstance(values, str) or not isinstance(values, Sequence) else values:
                found.append(Budget(((unit, parse_budget(value, size)),)))
    elif isinstance(budgets, Sequence) and budgets and not isinstance(budgets, str):
        found = [parse_limits(text, whole) for text in budgets]
    else:
        raise BudgetError(
            f'got the budgets {budgets!r}; needed: a dict such as {{"macs": ["60%", "300M"]}}, or a list such as '
            f'["macs<=300M and params<=2M"], units {list(UNITS)}'
        )
    if not found:
        raise BudgetError("got no budget; needed: at least one number")
    for budget in found:
        within_reach(supernet, budget)
    shares = {b: sorted((limit / getattr(whole, unit), unit, limit) for unit, limit in b.limits) for b in found}
    return sorted(found, key=lambda b: shares[b], reverse=True)


def within_reach(supernet: Supernet, budget: Budget) -> Widths:
    """Return a subnet within the budget: the narrowest, or else the widest uniform one that is.

    No subnet has fewer MACs or parameters than the narrowest. Memory and latency need not be the least there.

    Raises:
        BudgetError: neither is within the budget; the text says what the narrowest costs.
    """
    space = supernet.space
    spent = cost(supernet, space.min())
    exceeded = budget.exceeded(spent)
    if not exceeded:
        return space.min()
    uniform = [] if any(unit in _GROWING for unit, _ in exceeded) else [space.uniform(ratio) for ratio in _RATIOS]
    for widths in dict.fromkeys(uniform):
        if budget.holds(cost(supernet, widths)):
            return widths
    unit, limit = next((e for e in exceeded if e[0] in _GROWING), exceeded[0])
    narrowest, whole = float(getattr(spent, unit)), float(getattr(cost(supernet), unit))
    digits = 3 if unit == "latency_ms" else 0
    also = ", and no uniform one holds it" if uniform else ""
    raise BudgetError(
        f"the budget of {limit:,.{digits}f} {unit} is out of reach: the narrowest subnet of the search space has "
        f"{narrowest:,.{digits}f} ({narrowest / whole:.1%} of the whole){also}; raise "
        "the budget, or lower `min` in convert()"
    )


def uniform_within(supernet: Supernet, budget: Budget) -> Widths:
    """Return the widths of the widest uniform multiplier within the budget, rounded to single units.

    The divisor is left out of account, so that uniform slimming, the baseline of every search, uses its budget up.

    Raises:
        BudgetError: the budget is out of reach, see `within_reach`.
    """
    space = supernet.space
    low, high = 0.0, 1.0
    if budget.holds(cost(supernet)):
        return space.max()
    for _ in range(40):  # memory and latency may grow as the multiplier falls: then this is one that holds, of several
        middle = (low + high) / 2
        if budget.holds(cost(supernet, space.uniform(middle, exact=True))):
            low = middle
        else:
            high = middle
    return space.uniform(low, exact=True) if low > 0 else within_reach(supernet, budget)


def uniform_at(supernet: Supernet, unit: str, budget: float | str) -> Widths:
    """Return the widths of the widest uniform multiplier whose cost is at most the budget, rounded to single units.

    The divisor is left out of account, so that uniform slimming, the baseline of every search, uses its budget up.

    Raises:
        BudgetError: the budget is malformed, of an unknown unit, or out of reach.
    """
    check_unit(unit)
    return uniform_within(supernet, Budget(((unit, parse_budget(budget, getattr(cost(supernet), unit))),)))


def widest_within(supernet: Supernet, widths: Widths, name: str, budget: Budget, *, exact: bool = True) -> Widths:
    """Return these widths with one group as wide as the budget allows, and never narrower.

    With `exact`, widths that the divisor and `choices` leave out are used as well: these shape what is sampled, and
    every integer up to the group's size is a subnet. Without it, only the group's choices are.
    """
    group, now = supernet.space[name], widths[name]
    wider = range(now + 1, group.size + 1) if exact else [c for c in group.choices if c > now]
    # memory and latency may fall as the width grows: then this is a width that holds, if not the widest
    fitting = bisect.bisect(wider, False, key=lambda w: not budget.holds(cost(supernet, widths.replaced(name, w))))
    return widths.replaced(name, wider[fitting - 1]) if fitting else widths


def fill_budget(
    supernet: Supernet, widths: Widths, budget: Budget, names: Sequence[str], *, exact: bool = True
) -> Widths:
    """Return these widths with one group after the other as wide as fits, until less than 1 % of the budget is left."""
    for name in names:
        if budget.used(cost(supernet, widths)) >= FILLED:
            break
        widths = widest_within(supernet, widths, name, budget, exact=exact)
    return widths
