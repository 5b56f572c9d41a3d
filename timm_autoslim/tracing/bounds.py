"""Answers of questions about sizes without trying widths: from sums of widths, and from bounds of numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm_autoslim.tracing.formulas import AttributeFormula, Count
from timm_autoslim.tracing.origins import FromExpression, Number, strip_origin
from timm_autoslim.tracing.watching import Lookup

Formula = Count | AttributeFormula
Widths = Sequence[tuple[int, int]]  # by group, its narrowest and its widest width
_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)


@dataclass(frozen=True)
class Sum:
    """A number that is `constant + sum(factor * width[group])`."""

    constant: int | float
    terms: Mapping[int, int | float]

    def plus(self, other: Sum, times: int = 1) -> Sum:
        """Return this sum and `times` another one."""
        terms = dict(self.terms)
        for group, factor in other.terms.items():
            terms[group] = terms.get(group, 0) + times * factor
        return Sum(self.constant + times * other.constant, {g: factor for g, factor in terms.items() if factor})

    def times(self, factor: int | float) -> Sum:
        """Return `factor` times this sum."""
        return Sum(factor * self.constant, {g: factor * f for g, f in self.terms.items()} if factor else {})

    def divide(self, divisor: int) -> Sum | None:
        """Return this sum divided by an integer, if nothing is left over at any width."""
        numbers = (self.constant, *self.terms.values())
        if any(not isinstance(number, int) or number % divisor for number in numbers):
            return None
        return Sum(int(self.constant) // divisor, {g: int(f) // divisor for g, f in self.terms.items()})

    def find_bounds(self, widths: Widths) -> tuple[float, float]:
        """Return the smallest and the largest value."""
        ends = [sorted((factor * widths[g][0], factor * widths[g][1])) for g, factor in self.terms.items()]
        return self.constant + sum(low for low, _ in ends), self.constant + sum(high for _, high in ends)


class Bounds:
    """What numbers can be in all subnets of a space.

    Attributes:
        formulas: by id of a size that can shrink, its value as a function of the widths.
        widths: by group, its narrowest and its widest width.
    """

    def __init__(self, formulas: Mapping[int, Formula], widths: Widths) -> None:
        self.formulas, self.widths = formulas, widths

    def is_constant(self, compute: Callable[..., Any], inputs: Sequence[Any]) -> bool:
        """Whether a function of these numbers is known to have the same answer at all widths."""
        if compute is strip_origin:  # the number itself
            low, high = self.find_bounds(inputs[0])
            return low == high
        if compute is bool:
            return self._is_constant(operator.ne, inputs[0], 0)
        if isinstance(compute, Lookup):
            return all(self._is_constant(operator.eq, inputs[0], key) for key in compute.keys)
        return compute in _COMPARISONS and self._is_constant(compute, *inputs)

    def _is_constant(self, compute: Callable[..., Any], a: Any, b: Any) -> bool:
        left, right = self.make_sum(a), self.make_sum(b)
        if left is not None and right is not None:
            difference = left.plus(right, -1)
            if not difference.terms:
                return True
            low, high = difference.find_bounds(self.widths)
        else:
            (low_a, high_a), (low_b, high_b) = self.find_bounds(a), self.find_bounds(b)
            low, high = low_a - high_b, high_a - low_b
        if low > 0 or high < 0 or low == high:
            return True
        return (compute in (operator.lt, operator.ge) and low == 0) or (
            compute in (operator.gt, operator.le) and high == 0
        )

    def make_sum(self, number: Any) -> Sum | None:
        """Return a number as a sum of widths, if it is one."""
        if not isinstance(number, Number):
            return Sum(number, {}) if isinstance(number, int) else None  # sums of floats depend on their order
        if not isinstance(number.origin, FromExpression):
            if id(number) in self.formulas:
                return _make_sum(self.formulas[id(number)])
            return Sum(int.__int__(number), {}) if isinstance(number, int) else None
        compute, inputs = number.origin.compute, number.origin.inputs
        sums = [self.make_sum(value) for value in inputs]
        if None in sums:
            return None
        if not any(s.terms for s in sums if s is not None):
            return Sum(int.__int__(number), {}) if isinstance(number, int) else None
        return _combine(compute, [s for s in sums if s is not None])

    def find_bounds(self, number: Any) -> tuple[float, float]:
        """Return two numbers between which a number is at all widths."""
        exact = self.make_sum(number)
        if exact is not None:
            return exact.find_bounds(self.widths)
        if not isinstance(number, Number):
            return (number, number) if isinstance(number, (int, float)) else (-math.inf, math.inf)
        if not isinstance(number.origin, FromExpression):
            formula = self.formulas.get(id(number))
            if formula is None:
                return _read(number), _read(number)
            ends = [float(formula([pair[i] for pair in self.widths])) for i in (0, 1)]
            return min(ends), max(ends)
        compute, inputs = number.origin.compute, number.origin.inputs
        return _combine_bounds(compute, [self.find_bounds(v) for v in inputs], all(isinstance(v, int) for v in inputs))


def _read(number: Any) -> int | float:
    return int.__int__(number) if isinstance(number, int) else float.__float__(number)


def _make_sum(formula: Formula) -> Sum | None:
    if isinstance(formula, Count):
        return Sum(formula.fixed, dict(formula.terms))
    count = Sum(formula.count.fixed, dict(formula.count.terms))
    return count.times(int(formula.value)).divide(formula.length) if formula.power == 1 else None


def _combine(compute: Callable[..., Any], sums: Sequence[Sum]) -> Sum | None:
    """Return what a function computes from sums, if it is a sum."""
    if compute is operator.neg:
        return sums[0].times(-1)
    if len(sums) != 2:
        return None
    a, b = sums
    if compute in (operator.add, operator.sub):
        return a.plus(b, 1 if compute is operator.add else -1)
    if compute is operator.mul and not (a.terms and b.terms):
        return a.times(b.constant) if not b.terms else b.times(a.constant)
    if compute is operator.floordiv and not b.terms and isinstance(b.constant, int) and b.constant > 0:
        return a.divide(b.constant)
    if compute is operator.mod and not b.terms and isinstance(b.constant, int) and b.constant > 0:
        factors = a.terms.values()
        if isinstance(a.constant, int) and not any(not isinstance(f, int) or f % b.constant for f in factors):
            return Sum(a.constant % b.constant, {})
    return None


def _combine_bounds(
    compute: Callable[..., Any], bounds: Sequence[tuple[float, float]], integers: bool
) -> tuple[float, float]:
    """Return bounds of what a function computes from numbers within bounds, which may all be integers."""
    if compute in (operator.add, operator.sub) and len(bounds) == 2:
        (a, b), (c, d) = bounds
        return (a + c, b + d) if compute is operator.add else (a - d, b - c)
    positive = all(low >= 0 for low, _ in bounds)
    if positive and compute is operator.mul:
        return math.prod(low for low, _ in bounds), math.prod(high for _, high in bounds)
    if positive and compute in (operator.floordiv, operator.truediv) and bounds[1][0] > 0:
        (a, b), (c, d) = bounds
        return (a // d, b // c) if compute is operator.floordiv else (a / d, b / c)
    if compute is operator.mod and bounds[1][0] > 0:
        return 0, bounds[1][1] - 1 if integers else bounds[1][1]
    return -math.inf, math.inf
