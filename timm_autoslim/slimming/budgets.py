"""Budgets: upper limits in one metric or in several, and the widths that meet them."""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from timm_autoslim.errors import BudgetError

if TYPE_CHECKING:
    from timm_autoslim.supernet.space import Widths
    from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.costs.cost import UNITS, Cost, check_unit, cost

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
