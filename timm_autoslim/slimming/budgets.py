"""Budgets: upper limits in one metric or in several, as a user writes them and as numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

from timm_autoslim.costs.cost import Cost
from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.errors import BudgetError
from timm_autoslim.utils.arguments import check_type, quote

Amount = float | str
Limit = tuple[str, Amount]  # a metric, and the amount as the user wrote it

_SUFFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "": 1.0}
_AMOUNT = re.compile(r"(.*?)(%|[kKMG]|[KMG]i)?", re.DOTALL)
_LIMIT = re.compile(r"\s*(\w+)\s*<?=(.*)")
_BARE = re.compile(r"\s*[+-]?[\d.][^=<>\s]*\s*")  # an amount without a metric: of MACs
_FORMS = 'a dict such as {"macs": ["60%", "300M"]}, or one text or a list such as ["50%", "macs<=300M and params<=2M"]'


@dataclass(frozen=True)
class Budget:
    """The upper limits that one network must keep, in one metric or in several; all of them must hold.

    Attributes:
        limits: metric and limit, each metric once.
        text: the budget as the user wrote it, such as "macs<=60%"; two budgets with the same limits are equal.

    Raises:
        BudgetError: an argument of the wrong type.

    Example:
        >>> budget = Budget((("macs", 3e6), ("params", 1e6)))
        >>> budget.text
        'macs<=3000000 and params<=1000000'
        >>> budget.exceeded(Cost(macs=2_000_000, params=1_500_000))
        (('params', 1000000.0),)
    """

    limits: tuple[tuple[str, float], ...]
    text: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.limits, tuple) or not all(_is_limit(limit) for limit in self.limits):
            needed = 'a tuple of pairs of a metric and a number, such as (("macs", 3e6),)'
            raise BudgetError.at("limits", got=quote(self.limits), needed=needed)
        check_type("text", self.text, str, BudgetError, "a text")
        if not self.text:
            object.__setattr__(self, "text", _write_text(self.limits))

    @property
    def slug(self) -> str:
        """The text as a part of a file's name, such as `macs-60pct-params-2M`."""
        return make_slug(self.text)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it limits."""
        return tuple(metric for metric, _ in self.limits)

    def exceeded(self, cost: Cost) -> tuple[tuple[str, float], ...]:
        """Return the limits that a cost is above."""
        return tuple((metric, limit) for metric, limit in self.limits if not cost.pick(metric) <= limit)

    def holds(self, cost: Cost) -> bool:
        """Whether a cost is above none of the limits."""
        return not self.exceeded(cost)

    def tightest(self, cost: Cost) -> tuple[str, float]:
        """Return the limit of which a cost is the largest share."""
        return max(self.limits, key=lambda item: float(cost.pick(item[0])) / item[1])

    def used(self, cost: Cost) -> float:
        """Return the largest share of any limit that a cost is; at most 1 if the budget holds."""
        metric, limit = self.tightest(cost)
        return float(cost.pick(metric)) / limit


Budgets = str | Budget | Mapping[str, Amount | Sequence[Amount]] | Sequence[str | Budget]


def _is_limit(limit: object) -> bool:
    return isinstance(limit, tuple) and len(limit) == 2 and isinstance(limit[0], str) and isinstance(limit[1], Real)


def make_slug(text: str) -> str:
    """Return the text of a budget as a part of a file's name: "macs<=60%" as "macs-60pct"."""
    return text.replace(" and ", "-").replace("<=", "-").replace("%", "pct")


def _write_text(limits: Sequence[Limit]) -> str:
    amounts = [amount.strip() if isinstance(amount, str) else _write_number(float(amount)) for _, amount in limits]
    return " and ".join(f"{metric}<={amount}" for (metric, _), amount in zip(limits, amounts, strict=True))


def _write_number(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)


def parse_amount(amount: Amount, widest: float) -> float:
    """Return an amount as a number: 300e6, "500k" or "500K", "300M", "1.2G", "20Mi" (of 1,048,576), "60%" of `widest`.

    Raises:
        BudgetError: the text is no amount, or the number is not positive.
    """
    number: float
    try:
        if isinstance(amount, str):
            match = _AMOUNT.fullmatch(amount.strip())
            assert match is not None
            number = float(match[1])
            number = number / 100 * widest if match[2] == "%" else number * _SUFFIXES[match[2] or ""]
        elif isinstance(amount, Real) and not isinstance(amount, bool):
            number = float(amount)
        else:
            raise TypeError
    except OverflowError:
        number = float("inf")
    except (TypeError, ValueError):
        raise BudgetError.at("the budget", got=repr(amount), needed='a number, "300M", "1.2G" or "60%"') from None
    if not 0 < number < float("inf"):
        raise BudgetError.at("the budget", got=repr(amount)[:40], needed="a positive number")
    return number


def split_limits(text: str) -> list[Limit]:
    """Return the limits of a text such as "macs<=300M and params<=40%", as they stand there.

    `macs=300M` is the same as `macs<=300M`, and so is `300M`.

    Raises:
        BudgetError: the text is not of this form, or a metric is unknown or named twice.
    """
    limits: dict[str, Amount] = {}
    if isinstance(text, str) and _BARE.fullmatch(text):
        return [("macs", text)]
    for part in re.split(r"\sand\s", text) if isinstance(text, str) else [""]:
        match = _LIMIT.fullmatch(part)
        if match is None:
            needed = (
                "a text of METRIC<=AMOUNT joined by `and`, such as "
                f'"macs<=300M and params<=2M", or an amount of MACs, metrics {list(METRICS)}'
            )
            raise BudgetError.at("the budget", got=repr(text), needed=needed)
        METRICS.pick(match[1])
        if match[1] in limits:
            raise BudgetError.at(
                "the budget", got=f"{text!r}, which limits {match[1]} twice", needed="every metric once"
            )
        limits[match[1]] = match[2]
    return list(limits.items())


def make_budget(limits: Budget | Sequence[Limit], widest: Cost) -> Budget:
    """Return a budget with its amounts as numbers; per cent are of the widest subnet. A `Budget` keeps its text.

    Raises:
        BudgetError: an amount is malformed.
    """
    pairs: Sequence[Limit] = limits.limits if isinstance(limits, Budget) else limits
    numbers = tuple((metric, parse_amount(amount, widest.pick(metric))) for metric, amount in pairs)
    return Budget(numbers, limits.text if isinstance(limits, Budget) else _write_text(pairs))


def check_tight(budgets: Sequence[Budget], original: Cost) -> None:
    """Make sure that every budget asks for less than the original.

    Raises:
        BudgetError: the original is within one of them, so nothing would be slimmed.
    """
    for budget in budgets:
        if budget.holds(original):
            spent = " and ".join(METRICS[metric].format(original.pick(metric)) for metric in budget.metrics)
            got = f"a budget that the original is within ({spent})"
            raise BudgetError.at(f"the budget {budget.text}", got=got, needed="a limit below what the original has")


def list_metrics(budget: Budget | Sequence[Limit]) -> tuple[str, ...]:
    """Return the metrics that a budget limits."""
    return budget.metrics if isinstance(budget, Budget) else tuple(metric for metric, _ in budget)


def list_limits(budgets: Budgets) -> list[Budget | list[Limit]]:
    """Return the limits of every budget, as the user wrote them; `parse_budgets` says in which forms.

    Raises:
        BudgetError: the budgets are of another form, or a metric is unknown or named twice.
    """
    if isinstance(budgets, str | Budget):
        budgets = [budgets]
    if isinstance(budgets, Mapping) and budgets:
        limits: list[Budget | list[Limit]] = []
        for metric, amounts in budgets.items():
            METRICS.pick(metric)
            several = [amounts] if isinstance(amounts, str) or not isinstance(amounts, Sequence) else amounts
            limits += [[(metric, amount)] for amount in several]
    elif isinstance(budgets, Sequence) and budgets:
        limits = [budget if isinstance(budget, Budget) else split_limits(budget) for budget in budgets]
    else:
        raise BudgetError.at("budgets", got=repr(budgets), needed=f"{_FORMS}, metrics {list(METRICS)}")
    if not limits:
        raise BudgetError.at("budgets", got="no budget", needed="at least one number")
    return limits
