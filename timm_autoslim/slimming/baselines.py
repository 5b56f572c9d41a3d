"""Simpler ways to choose widths, with the interface of `search` and counted in the same way, to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from timm_autoslim.costs.cost import cost
from timm_autoslim.errors import ConfigError
from timm_autoslim.slimming.budgets import Budget, Budgets, fill_budget, read_budgets, uniform_within, within_reach
from timm_autoslim.slimming.result import Found, SearchResult
from timm_autoslim.slimming.scoring import Evaluate, Scorer, Scores, Team
from timm_autoslim.supernet.space import Widths, draw
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.utils.arguments import check_integer, make_generator

Kind = Literal["uniform", "random", "importance", "evolutionary"]

MUTATED = 0.1  # share of the groups that a mutation draws anew (arXiv 1904.00420, section 3.4)


def baseline(
    supernet: Supernet,
    budgets: Budgets,
    evaluate: Evaluate,
    kind: Kind,
    *,
    candidates: int = 100,
    population: int = 20,
    criterion: str = "l2",
    seed: int = 0,
    scores: Scores | None = None,
    team: Team | None = None,
) -> SearchResult:
    """Choose widths for every budget by a baseline instead of by greedy slimming.

    No network is above its budget, and all but the uniform one land within 1 % below it where single units allow; the
    widths need not be on the `choices` of the space. The same arguments give the same result. The kinds are:

    - "uniform": one multiplier for all groups, `uniform_at`; one subnet is scored.
    - "random": the best of `candidates` random subnets at the budget, a baseline that is hard to beat (Li and
      Talwalkar, arXiv 1902.07638).
    - "importance": a global ranking of all channels by a criterion of torch-pruning, normalised within each group, as
      its `global_pruning=True` does (DepGraph, arXiv 2301.12900): those with the lowest scores go first. A subnet keeps
      the first channels of each group, so convert with `order=` the same criterion to keep those that were ranked
      highest. One subnet is scored. Groups of which the criterion says nothing keep the share that all others keep.
    - "evolutionary": mutation and crossover of the best half of a population (Single Path One-Shot, arXiv 1904.00420,
      section 3.4), `candidates` subnets in all, of which the first `population` are the uniform one and random ones.

    Args:
        supernet: a trained supernet.
        budgets, evaluate: as for `search`.
        kind: see above.
        candidates: subnets that "random" and "evolutionary" draw for each budget; one drawn twice is scored once.
        population: subnets that "evolutionary" keeps.
        criterion: a name in `timm_autoslim.supernet.order.CRITERIA`; "taylor" needs gradients in `supernet.model`.
        seed: of all random draws; each budget starts from it anew.
        scores, team: as for `search`.

    Returns:
        A result without steps.

    Raises:
        BudgetError: a budget is malformed or out of reach; nothing was evaluated then.
        ConfigError: another argument is unknown, of the wrong type or out of range.
        WidthError: the criterion is "taylor" and a weight that it reads has no gradient.
        EvaluationError, LatencyError, StaleStatisticsError: as in `search`.
    """
    from timm_autoslim.supernet.order import CRITERIA  # torch-pruning loads slowly, and only rankings need it

    if kind not in get_args(Kind):
        raise ConfigError(f"got kind={kind!r}; needed: one of {list(get_args(Kind))}")
    if criterion not in list(CRITERIA):
        raise ConfigError(f"got criterion={criterion!r}; needed: one of {sorted(CRITERIA)}")
    candidates = check_integer("candidates", candidates, ConfigError)
    population = check_integer("population", population, ConfigError, least=2)
    make_generator(seed)  # refuses what is no seed; every budget starts one anew
    score = Scorer(supernet, evaluate, scores, team)
    ordered = read_budgets(supernet, budgets)
    choose: dict[Kind, Callable[[Budget], Widths]] = {
        "uniform": lambda budget: uniform_within(supernet, budget),
        "random": lambda budget: _best(_random(supernet, budget, candidates, make_generator(seed)), score),
        "importance": lambda budget: _ranked(supernet, budget, _unit_scores(supernet, criterion, seed)),
        "evolutionary": lambda budget: _evolved(supernet, budget, score, candidates, population, make_generator(seed)),
    }
    networks = []
    for budget in ordered:
        widths = choose[kind](budget)
        networks.append(Found.of(budget, widths, cost(supernet, widths), score(widths)))
    return SearchResult(tuple(networks), (), score.evaluations, score.macs)


def _best(subnets: Iterable[Widths], score: Scorer) -> Widths:
    """Return the subnet with the lowest error; of equals the first."""
    found = list(subnets)
    errors = score.many(found)
    return found[errors.index(min(errors))]


def _landed(supernet: Supernet, widths: Widths, budget: Budget, generator: torch.Generator) -> Widths:
    """Move all widths by one share until the budget is met, and fill it up.

    They move towards the widest, or from above the budget towards the subnet that `within_reach` has for it.
    """
    space = supernet.space
    narrowing = not budget.holds(cost(supernet, widths))
    start, end = (within_reach(supernet, budget), widths) if narrowing else (widths, space.max())

    def between(share: float) -> Widths:
        return space.from_dict({name: int(start[name] + share * (end[name] - start[name])) for name in space.names})

    low, high = 0.0, 1.0
    if budget.holds(cost(supernet, end)):
        return end
    for _ in range(20):  # `low` is a share that holds, the largest where the cost grows with it
        middle = (low + high) / 2
        if budget.holds(cost(supernet, between(middle))):
            low = middle
        else:
            high = middle
    order = torch.randperm(len(space), generator=generator)
    return fill_budget(supernet, between(low), budget, [space.names[i] for i in order])


def _random(supernet: Supernet, budget: Budget, n: int, generator: torch.Generator) -> Iterator[Widths]:
    """Draw every group on its own, then land at the budget."""
    for _ in range(n):
        yield _landed(supernet, _drawn(supernet, generator), budget, generator)


def _drawn(supernet: Supernet, generator: torch.Generator) -> Widths:
    groups = supernet.space.groups
    draws = draw(len(groups), generator)
    return supernet.space.from_dict(
        {g.name: g.choices[0] + int(u * (g.size - g.choices[0] + 1)) for u, g in zip(draws, groups, strict=True)}
    )


def _evolved(
    supernet: Supernet, budget: Budget, score: Scorer, candidates: int, population: int, generator: torch.Generator
) -> Widths:
    names = supernet.space.names
    alive = [_landed(supernet, uniform_within(supernet, budget), budget, generator)]
    alive += _random(supernet, budget, min(population, candidates) - 1, generator)
    drawn = len(alive)
    while True:
        score.many(alive)  # together, so that the processes of a team can share them
        alive = sorted(dict.fromkeys(alive), key=score)[:population]
        if drawn >= candidates:
            return alive[0]
        parents = alive[: max(1, population // 2)]
        for index in range(min(population, candidates - drawn)):
            one, two = (parents[int(u * len(parents))] for u in draw(2, generator))
            chance = MUTATED if index % 2 else 0.5  # mutations and crossovers take turns
            other = _drawn(supernet, generator) if index % 2 else two
            draws = dict(zip(names, draw(len(names), generator), strict=True))
            child = supernet.space.from_dict({n: other[n] if draws[n] < chance else one[n] for n in names})
            alive.append(_landed(supernet, child, budget, generator))
            drawn += 1


def _unit_scores(supernet: Supernet, criterion: str, seed: int) -> list[NDArray[np.float64]]:
    """Return, for every group, the scores of its units, falling."""
    from timm_autoslim.supernet.order import score_units

    graph = supernet.graph
    found: list[list[NDArray[np.float64]]] = [[] for _ in graph.group_sizes]
    for strand, scores in zip(graph.strands, score_units(supernet.model, graph, criterion, seed), strict=True):
        if scores is not None:
            falling = -np.sort(-np.nan_to_num(scores))
            # one unit of the group's width is `ratio` of each strand's
            found[strand.group].append(falling.reshape(-1, strand.ratio).mean(1))
    units: list[NDArray[np.float64] | None] = [np.mean(scores, axis=0) if scores else None for scores in found]
    # of a group without scores as many units are below any score as of all others; evenly, where there are no others
    known = np.concatenate([u for u in units if u is not None] or [np.array([0.0, 1.0])])
    return [
        np.quantile(known, (np.arange(size, 0, -1) - 0.5) / size) if scores is None else scores
        for scores, size in zip(units, graph.group_sizes, strict=True)
    ]


def _ranked(supernet: Supernet, budget: Budget, scores: list[NDArray[np.float64]]) -> Widths:
    """Take away the units with the lowest scores until the budget is met, and fill it up."""
    space = supernet.space
    owners = np.repeat(np.arange(len(space)), [len(s) for s in scores])
    owners = owners[np.argsort(np.concatenate(scores), kind="stable")]  # the group of every unit, lowest score first

    def without(count: int) -> Widths:
        gone = np.bincount(owners[:count], minlength=len(space))
        return space.from_dict(
            {g.name: max(g.choices[0], g.size - int(n)) for g, n in zip(space.groups, gone, strict=True)}
        )

    low, high = -1, len(owners)  # with all of them gone it is the narrowest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if budget.holds(cost(supernet, without(middle))) else (middle, high)
    widths = without(high)
    if not budget.holds(cost(supernet, widths)):  # the narrowest need not take the least memory or time
        widths = within_reach(supernet, budget)
    # the unit that would come back next is the best of those that went
    ahead = {g.name: s[widths[g.name]] for g, s in zip(space.groups, scores, strict=True) if widths[g.name] < g.size}
    return fill_budget(supernet, widths, budget, sorted(ahead, key=lambda name: -ahead[name]))
