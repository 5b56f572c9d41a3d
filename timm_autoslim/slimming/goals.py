"""Widths within a budget: whether there are any, the widest uniform ones, and how to fill what is left."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from timm_autoslim.costs.conditions import Conditions, check_conditions
from timm_autoslim.costs.cost import Cost, check_supernet, count_cost
from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.errors import BudgetError
from timm_autoslim.slimming.budgets import Amount, Budget, Budgets, list_limits, list_metrics, make_budget
from timm_autoslim.slimming.obstacles import describe_remedy
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths

FILLED = 0.99  # a budget of which this share is used counts as used up
_RATIOS = [i / 20 for i in range(20, 0, -1)]  # of the uniform subnets that are tried where the narrowest is over budget


@dataclass(frozen=True)
class Goal:
    """A budget for one supernet.

    Attributes:
        supernet: the supernet.
        budget: its limits.
        conditions: what memory and latency are counted for.
    """

    supernet: Supernet
    budget: Budget
    conditions: Conditions = field(default_factory=Conditions)

    def cost(self, widths: Widths) -> Cost:
        """Return the cost of a subnet: MACs, parameters, and the metrics that the budget limits."""
        return count_cost(self.supernet, widths, self.budget.metrics, self.conditions)

    def holds(self, widths: Widths) -> bool:
        """Whether a subnet is within the budget."""
        return self.budget.holds(self.cost(widths))

    def used(self, widths: Widths) -> float:
        """Return the largest share of any limit that a subnet costs."""
        return self.budget.used(self.cost(widths))


def parse_budgets(supernet: Supernet, budgets: Budgets, *, conditions: Conditions | None = None) -> list[Budget]:
    """Read and validate budgets, and order them as a descent meets them: the largest share of the widest first.

    Args:
        supernet: per cent are of its widest subnet.
        budgets: by metric (a key of `METRICS`), a number, a text such as "300M" or "60%", or a list of them, each a
            budget of its own; or a text or a list of texts such as "macs<=300M and params<=2M", where all limits of one
            text must hold, "macs=300M" or, for MACs, "300M". A `Budget` stands for itself, its text too.
        conditions: what `peak_bytes` and `latency_ms` are counted for; None is one image, in the model's type.

    Raises:
        BudgetError: a budget is malformed, or out of reach: neither the narrowest subnet nor a uniform one holds it.
        LatencyError: a prediction is no positive number.
        ConfigError: the model is no supernet, or the conditions are none.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> for budget in parse_budgets(supernet, {"macs": ["40%", "60%"]}):
        ...     print(budget.text, budget.limits)
        macs<=60% (('macs', 13432627.2),)
        macs<=40% (('macs', 8955084.8),)
    """
    check_supernet(supernet)
    conditions = check_conditions(conditions)
    limits = list_limits(budgets)
    metrics = dict.fromkeys(metric for of_one in limits for metric in list_metrics(of_one))
    widest = count_cost(supernet, supernet.space.max(), metrics, conditions)
    parsed = [make_budget(of_one, widest) for of_one in limits]
    for budget in parsed:
        find_subnet(Goal(supernet, budget, conditions))

    def shares(budget: Budget) -> list[tuple[float, str, float]]:
        return sorted((limit / widest.pick(metric), metric, limit) for metric, limit in budget.limits)

    return sorted(parsed, key=shares, reverse=True)


def uniform_at(supernet: Supernet, metric: str, budget: Amount, *, conditions: Conditions | None = None) -> Widths:
    """Return the widths of the widest uniform multiplier whose cost is at most the budget, rounded to single units.

    The divisor of the search space is left out of account, so that uniform slimming uses its budget up.

    Args:
        supernet: the supernet.
        metric: a key of `METRICS`.
        budget: a number, or a text such as "300M" or "60%" (of the widest).
        conditions: what `peak_bytes` and `latency_ms` are counted for; None is one image, in the model's type.

    Raises:
        BudgetError: the budget is malformed, of an unknown metric, or out of reach.
        ConfigError: the model is no supernet, or the conditions are none.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert, cost
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> widths = uniform_at(supernet, "macs", "50%")
        >>> round(cost(supernet, widths).macs / cost(supernet).macs, 2)
        0.5
    """
    check_supernet(supernet)
    conditions = check_conditions(conditions)
    METRICS.pick(metric)
    widest = count_cost(supernet, supernet.space.max(), [metric], conditions)
    return find_uniform(Goal(supernet, make_budget([(metric, budget)], widest), conditions))


def find_subnet(goal: Goal) -> Widths:
    """Return a subnet within the budget: the narrowest, or else the widest uniform one that is.

    No subnet has fewer MACs or parameters than the narrowest. Memory and latency need not be the least there.

    Raises:
        BudgetError: neither is within the budget; the text says what the narrowest costs.
    """
    space = goal.supernet.space
    spent = goal.cost(space.min())
    exceeded = goal.budget.exceeded(spent)
    if not exceeded:
        return space.min()
    grows = [metric for metric, _ in exceeded if METRICS[metric].grows]
    subnets = [] if grows else list(dict.fromkeys(space.uniform(ratio) for ratio in _RATIOS))
    for widths in subnets:
        if goal.holds(widths):
            return widths
    metric, limit = next((e for e in exceeded if e[0] in grows), exceeded[0])
    narrowest, widest = spent.pick(metric), goal.cost(space.max()).pick(metric)
    amount, least = _write_amounts(limit, narrowest, places=3 if metric == "latency_ms" else 0)
    also = ", and no uniform one holds it" if subnets else ""
    share = f'a share of the widest is written "{100 * limit if limit <= 1 else limit:g}%"; ' if limit <= 100 else ""
    share = "" if metric == "latency_ms" else share  # milliseconds may well be below 100
    raise BudgetError(
        f"the budget of {amount} {metric} is out of reach: the narrowest subnet of the search space has "
        f"{least} ({narrowest / widest:.1%} of the widest){also}; {share}"
        f"{describe_remedy(goal.supernet, goal.budget, metric)}"
    )


def _write_amounts(limit: float, cost: float, places: int) -> tuple[str, str]:
    """Return a limit and a larger cost with so many decimal places, or with more if they would look the same or be 0.

    Example:
        >>> _write_amounts(0.25, 1300, places=0)
        ('0.25', '1,300')
    """

    def write(number: float, places: int) -> str:
        text = f"{number:,.{places}f}"
        return text if float(text.replace(",", "")) else f"{number:g}"

    more = next((p for p in range(places, places + 9) if write(limit, p) != write(cost, p)), places)
    return write(limit, more), write(cost, places if float(cost).is_integer() else more)


def find_uniform(goal: Goal) -> Widths:
    """Return the widths of the widest uniform multiplier within the budget, rounded to single units.

    Raises:
        BudgetError: the budget is out of reach, see `find_subnet`.
    """
    space = goal.supernet.space
    low, high = 0.0, 1.0
    if goal.holds(space.max()):
        return space.max()
    for _ in range(40):  # memory and latency may grow as the multiplier falls: then this is one that holds, of several
        middle = (low + high) / 2
        if goal.holds(space.uniform(middle, exact=True)):
            low = middle
        else:
            high = middle
    return space.uniform(low, exact=True) if low > 0 else find_subnet(goal)


def widen(goal: Goal, widths: Widths, name: str, *, exact: bool = True) -> Widths:
    """Return these widths with one group as wide as the budget allows, and never narrower.

    With `exact`, widths that the divisor and `choices` leave out are used as well: these shape what is sampled, and
    every integer up to the group's size is a subnet. Without it, only the group's choices are.
    """
    group, now = goal.supernet.space[name], widths[name]
    wider = range(now + 1, group.size + 1) if exact else [c for c in group.choices if c > now]
    # memory and latency may fall as the width grows: then this is a width that holds, if not the widest
    fitting = bisect.bisect(wider, False, key=lambda w: not goal.holds(widths.replace(name, w)))
    return widths.replace(name, wider[fitting - 1]) if fitting else widths


def fill(goal: Goal, widths: Widths, names: Sequence[str], *, exact: bool = True) -> Widths:
    """Return these widths with one group after the other as wide as fits, until less than 1 % of the budget is left."""
    for name in names:
        if goal.used(widths) >= FILLED:
            break
        widths = widen(goal, widths, name, exact=exact)
    return widths
