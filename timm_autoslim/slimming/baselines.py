"""Simpler ways to choose widths, with the interface of `search` and counted in the same way, to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from timm_autoslim.costs.conditions import Conditions
from timm_autoslim.errors import ConfigError
from timm_autoslim.slimming.budgets import Budgets
from timm_autoslim.slimming.goals import Goal, fill, find_subnet, find_uniform, parse_budgets
from timm_autoslim.slimming.held_out import Evaluate
from timm_autoslim.slimming.network import Found
from timm_autoslim.slimming.progress import show_scores
from timm_autoslim.slimming.result import SearchResult
from timm_autoslim.slimming.scoring import Scorer, Scores
from timm_autoslim.slimming.team import Team, check_team_conditions
from timm_autoslim.supernet.space import draw_numbers
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.utils.arguments import check_flag, check_integer, make_generator
from timm_autoslim.utils.tables import Table

MUTATED = 0.1  # share of the groups that a mutation draws anew (arXiv 1904.00420, section 3.4)


@dataclass(frozen=True)
class Options:
    """What a baseline may use besides the budget: the arguments of `baseline`, and what scores subnets."""

    score: Scorer
    candidates: int
    population: int
    criterion: str
    seed: int


BASELINES: Table[Callable[[Goal, Options], Widths]] = Table("method")
"""Baselines by name; each gets a budget to meet and the options of `baseline`, and returns widths."""


def baseline(
    supernet: Supernet,
    budgets: Budgets,
    evaluate: Evaluate,
    method: str,
    *,
    maximize: bool = False,
    conditions: Conditions | None = None,
    candidates: int = 100,
    population: int = 20,
    criterion: str = "l2",
    seed: int = 0,
    scores: Scores | None = None,
    team: Team | None = None,
    progress: bool = True,
) -> SearchResult:
    """Choose widths for every budget by a baseline instead of by greedy slimming.

    No network is above its budget, and all but the uniform one are within 1 % below it where single units allow; the
    widths need not be on the `choices` of the space. The same arguments give the same result. The methods are:

    - "uniform": one multiplier for all groups, `uniform_at`; one subnet is scored.
    - "random": the best of `candidates` random subnets at the budget, a baseline that is hard to beat (Li and
      Talwalkar, arXiv 1902.07638).
    - "importance": a global ranking of all channels by a criterion of torch-pruning, normalised within each group, as
      its `global_pruning=True` does (DepGraph, arXiv 2301.12900): those with the lowest scores go first. A subnet keeps
      the first channels of each group, so convert with `order=` the same criterion to keep those that were ranked
      highest. One subnet is scored. Groups of which the criterion says nothing keep the share that all others keep.
    - "isomorphic": the same ranking, but among groups of the same structure (Isomorphic Pruning, arXiv 2407.04616, as
      torch-pruning's `isomorphic=True`): scores of layers of different types say nothing of each other, so the same
      share of the channels goes from each kind of groups. The paper's criterion is "taylor".
    - "evolutionary": mutation and crossover of the best half of a population (Single Path One-Shot, arXiv 1904.00420,
      section 3.4), `candidates` subnets in all, of which the first `population` are the uniform one and random ones.

    Args:
        supernet: a trained supernet.
        budgets, evaluate, maximize, conditions: as for `search`. "random" and "evolutionary", which choose by the loss,
            score the widest and the narrowest first, as it does.
        method: a key of `BASELINES`, see above.
        candidates: subnets that "random" and "evolutionary" draw for each budget; one drawn twice is scored once.
        population: subnets that "evolutionary" keeps.
        criterion: a key of `CRITERIA`, for "importance" and "isomorphic"; "taylor" needs gradients in `supernet.model`.
            Global first-order ranking is "importance" with "taylor", and DepGraph's group magnitude that with "l2".
        seed: of all random draws; each budget starts from it anew.
        scores, team, progress: as for `search`.

    Returns:
        A result without steps.

    Raises:
        BudgetError: a budget is malformed or out of reach; nothing was evaluated then.
        ConfigError: another argument is unknown, of the wrong type or out of range.
        WidthError: the criterion is "taylor" and a weight that it reads has no gradient.
        EvaluationError, LatencyError, StaleStatisticsError: as in `search`.

    Example:
        >>> import timm
        >>> from timm_autoslim import convert, cost
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> result = baseline(supernet, {"macs": ["60%", "30%"]}, lambda subnet: 0.0, "uniform")
        >>> [round(network.cost.macs / cost(supernet).macs, 2) for network in result.networks]
        [0.6, 0.3]
    """
    from timm_autoslim.supernet.order import CRITERIA  # torch-pruning loads slowly, and only rankings need it

    choose = BASELINES.pick(method)
    CRITERIA.pick(criterion)
    candidates = check_integer("candidates", candidates, ConfigError)
    population = check_integer("population", population, ConfigError, least=2)
    check_flag("progress", progress)
    make_generator(seed)  # refuses what is no seed; every budget starts one anew
    score = Scorer(supernet, evaluate, scores, team, maximize)
    conditions = check_team_conditions(conditions, score.team)
    goals = [Goal(supernet, budget, conditions) for budget in parse_budgets(supernet, budgets, conditions=conditions)]
    options = Options(score, candidates, population, criterion, int(seed))
    networks = []
    with show_scores(score, f"baseline {method}", progress):
        score.compare_scores()
        for goal in goals:
            widths = choose(goal, options)
            networks.append(Found.of(method, goal, widths, score(widths)))
    settings = {"candidates": candidates, "population": population, "criterion": criterion, "seed": options.seed}
    settings |= {"maximize": True} if maximize else {}
    return SearchResult.of(score, goals, networks, [], settings)


# -- one multiplier, or chance --------------------------------------------------------------------------------------


@BASELINES.add("uniform")
def _choose_uniform(goal: Goal, options: Options) -> Widths:
    return find_uniform(goal)


@BASELINES.add("random")
def _choose_random(goal: Goal, options: Options) -> Widths:
    options.score.check_direction()
    subnets = list(_draw_within(goal, options.candidates, make_generator(options.seed)))
    losses = options.score.many(subnets)
    return subnets[losses.index(min(losses))]


def _draw_within(goal: Goal, count: int, generator: torch.Generator) -> Iterator[Widths]:
    """Draw random subnets at the budget: every group by itself, then all moved to it."""
    for _ in range(count):
        yield _move(goal, _draw(goal.supernet, generator), generator)


def _draw(supernet: Supernet, generator: torch.Generator) -> Widths:
    groups = supernet.space.groups
    draws = draw_numbers(len(groups), generator)
    return supernet.space.from_dict(
        {g.name: g.choices[0] + int(u * (g.size - g.choices[0] + 1)) for u, g in zip(draws, groups, strict=True)}
    )


def _move(goal: Goal, widths: Widths, generator: torch.Generator) -> Widths:
    """Move all widths by one share until the budget is met, and fill it up.

    They move towards the widest, or from above the budget towards the subnet that `find_subnet` has for it.
    """
    space = goal.supernet.space
    start, end = (widths, space.max()) if goal.holds(widths) else (find_subnet(goal), widths)

    def between(share: float) -> Widths:
        return space.from_dict({name: int(start[name] + share * (end[name] - start[name])) for name in space.names})

    low, high = 0.0, 1.0
    if goal.holds(end):
        return end
    for _ in range(20):  # `low` is a share that holds, the largest where the cost grows with it
        middle = (low + high) / 2
        if goal.holds(between(middle)):
            low = middle
        else:
            high = middle
    order = torch.randperm(len(space), generator=generator)
    return fill(goal, between(low), [space.names[i] for i in order])


# -- importance -----------------------------------------------------------------------------------------------------


@BASELINES.add("importance")
def _choose_by_importance(goal: Goal, options: Options) -> Widths:
    return _remove_lowest(goal, _score_units(goal.supernet, options.criterion, options.seed))


@BASELINES.add("isomorphic")
def _choose_isomorphic(goal: Goal, options: Options) -> Widths:
    scores = _score_units(goal.supernet, options.criterion, options.seed)
    return _remove_lowest(goal, rank_within_structures(goal.supernet, scores))


def _remove_lowest(goal: Goal, scores: list[NDArray[np.float64]]) -> Widths:
    """Take away the units with the lowest scores until the budget is met, and fill it up.

    Args:
        goal: the budget to meet.
        scores: for every group those of its units, falling.
    """
    space = goal.supernet.space
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
        low, high = (low, middle) if goal.holds(without(middle)) else (middle, high)
    widths = without(high)
    if not goal.holds(widths):  # the narrowest need not take the least memory or time
        widths = find_subnet(goal)
    # the unit that would come back next is the best of those that went
    ahead = {g.name: s[widths[g.name]] for g, s in zip(space.groups, scores, strict=True) if widths[g.name] < g.size}
    return fill(goal, widths, sorted(ahead, key=lambda name: -ahead[name]))


def _score_units(supernet: Supernet, criterion: str, seed: int) -> list[NDArray[np.float64]]:
    """Return, for every group, the scores of its units, falling."""
    from timm_autoslim.supernet.order import score_units

    graph = supernet.graph
    by_group: list[list[NDArray[np.float64]]] = [[] for _ in graph.group_sizes]
    for strand, scores in zip(graph.strands, score_units(supernet.model, graph, criterion, seed), strict=True):
        if scores is not None:
            falling = -np.sort(-np.nan_to_num(scores))
            # one unit of the group's width is `ratio` of each strand's
            by_group[strand.group].append(falling.reshape(-1, strand.ratio).mean(1))
    units: list[NDArray[np.float64] | None] = [np.mean(scores, axis=0) if scores else None for scores in by_group]
    # of a group without scores as many units are below any score as of all others; evenly, where there are no others
    pool = np.concatenate([u for u in units if u is not None] or [np.array([0.0, 1.0])])
    return [
        np.quantile(pool, (np.arange(size, 0, -1) - 0.5) / size) if scores is None else scores
        for scores, size in zip(units, graph.group_sizes, strict=True)
    ]


def rank_within_structures(supernet: Supernet, scores: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Return, for the units of every group, the share of the units of isomorphic groups that are below them."""
    from timm_autoslim.supernet.order import describe_structures

    graph = supernet.graph
    structures: list[list[tuple[str, ...]]] = [[] for _ in graph.group_sizes]
    for strand, layers in zip(graph.strands, describe_structures(supernet.model, graph), strict=True):
        structures[strand.group].append(layers)
    isomorphic: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for group, structure in enumerate(structures):
        isomorphic.setdefault(tuple(structure), []).append(group)
    ranks = list(scores)
    for groups in isomorphic.values():
        falling = np.concatenate([scores[index] for index in groups])
        shares = np.empty(len(falling))
        shares[np.argsort(-falling, kind="stable")] = (np.arange(len(falling), 0, -1) - 0.5) / len(falling)
        ends = np.cumsum([len(scores[index]) for index in groups])
        for index, part in zip(groups, np.split(shares, ends[:-1]), strict=True):
            ranks[index] = part
    return ranks


# -- evolution ------------------------------------------------------------------------------------------------------


@BASELINES.add("evolutionary")
def _evolve(goal: Goal, options: Options) -> Widths:
    score, population, candidates = options.score, options.population, options.candidates
    supernet, generator = goal.supernet, make_generator(options.seed)
    score.check_direction()
    names = supernet.space.names
    alive = [_move(goal, find_uniform(goal), generator)]
    alive += _draw_within(goal, min(population, candidates) - 1, generator)
    count = len(alive)
    while True:
        score.many(alive)  # together, so that the processes of a team can share them
        alive = sorted(dict.fromkeys(alive), key=score)[:population]
        if count >= candidates:
            return alive[0]
        parents = alive[: max(1, population // 2)]
        for index in range(min(population, candidates - count)):
            one, two = (parents[int(u * len(parents))] for u in draw_numbers(2, generator))
            chance = MUTATED if index % 2 else 0.5  # mutations and crossovers take turns
            other = _draw(supernet, generator) if index % 2 else two
            draws = dict(zip(names, draw_numbers(len(names), generator), strict=True))
            child = supernet.space.from_dict({n: other[n] if draws[n] < chance else one[n] for n in names})
            alive.append(_move(goal, child, generator))
            count += 1
