"""Greedy slimming (AutoSlim, arXiv 1903.11728, section 3): one descent from the widest subnet through every budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from timm_autoslim.costs.conditions import Conditions
from timm_autoslim.costs.cost import count_cost
from timm_autoslim.errors import ConfigError
from timm_autoslim.slimming.budgets import Budgets
from timm_autoslim.slimming.candidates import RANKINGS
from timm_autoslim.slimming.descent import MODES, Descent
from timm_autoslim.slimming.goals import Goal, parse_budgets
from timm_autoslim.slimming.held_out import Evaluate
from timm_autoslim.slimming.network import Found, Step
from timm_autoslim.slimming.progress import show_descent
from timm_autoslim.slimming.refinement import REFINEMENTS
from timm_autoslim.slimming.result import SearchResult
from timm_autoslim.slimming.scoring import Scorer, Scores
from timm_autoslim.slimming.team import Team, check_team_conditions
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.utils.arguments import check_callable, check_flag, check_integer, make_generator


def search(
    supernet: Supernet,
    budgets: Budgets,
    evaluate: Evaluate,
    *,
    maximize: bool = False,
    conditions: Conditions | None = None,
    mode: str = "fast",
    rank: str = "per_cost",
    steps: int | None = None,
    refine: str = "units",
    seed: int = 0,
    scores: Scores | None = None,
    team: Team | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Slim the supernet greedily down through every budget.

    Each step narrows the group by which the loss rises least (AutoSlim, arXiv 1903.11728, algorithm 1). Candidates are
    scored with batch-statistics BatchNorm, so stale running statistics never enter.

    Args:
        supernet: a trained supernet.
        budgets: by metric (a key of `METRICS`), a number, a text such as "500k", "300M" or "60%" (of the widest), or a
            list of them, each a budget of its own; or a text or a list of texts such as "macs<=300M and params<=2M",
            where all limits of one text must hold for one network; a `Budget` stands for itself, and a text without a
            metric is one of MACs.
        evaluate: called with a callable subnet (images (N, C, H, W) -> logits (N, K)); returns its loss on held-out
            images, lower is better. It must use the same images at every call. A `HeldOut` can be scored in parts,
            which the fast mode needs to save images; 8 to 16 parts are good.
        maximize: whether higher is better in what `evaluate` returns, such as an accuracy. Every `loss` of the result
            is the negative of it then. The widest and the narrowest subnet are scored first, on one part. A search the
            wrong way round is refused where both numbers count images, as accuracies do. Elsewhere there is a warning
            if the widest is clearly worse.
        conditions: what `peak_bytes` and `latency_ms` are counted for; None is one image, in the model's type.
        mode: "reference" scores every group at every step, on all held-out images, as published. "fast" comes to about
            the same networks with less forward work: at every step it scores the few groups that promise most by
            earlier scores, on a part of the images, which grows as the subnets get cheaper. That is a tenth of the work
            or less with many groups and a `HeldOut`, a fifth with few groups, a third with any other callable.
        rank: "loss" ranks candidates by loss alone, as published; "per_cost" by the rise of the loss for each part of
            the budget that they save.
        steps: the range of each group is walked in about this many steps; by default 10, as published (section 4), and
            5 in the fast mode, which looks at fewer images: larger steps stand out more from their noise.
        refine: how to fill what the descent leaves of a budget. Its steps are multiples of the divisor, so it stops up
            to a step of some group below its budget: two networks "at" one budget may differ by several per cent in
            cost, and could not be compared. "units" widens groups to within 1 % of the budget where single units allow:
            on the `choices` of the space as far as these go, then with as few groups as possible off them. "choices"
            stays on the choices, for devices that want multiples of a divisor; "none" leaves the widths as they are.
            The descent goes on from the unrefined widths, so one descent still serves every budget; a refined network
            is taken only if its loss is no higher. This scores at most 3 subnets for each group, and one more, for each
            budget. In the fast mode trades follow, about 3 for each group: a step or two less of one or two groups,
            chosen at random by `seed`, and more of others; each is made if it lowers the loss.
        seed: decides between candidates that are exactly equal, and what is traded.
        scores: a dict that is read before a subnet is scored, and gets what was scored. Its values are JSON: with the
            same dict from a file, an interrupted search scores only what is missing, and comes to the same result. It
            belongs to one state of the weights, the images and the metric: two of its scores are computed again first.
        team: the processes that share the scoring, if there are several; the result does not depend on them. Budgets of
            latency then need a `SharedLatency` in the conditions.
        on_step: called after every step.
        progress: whether to show a progress bar; only the first process of a team does.

    Returns:
        A result of the method "searched".

    Raises:
        BudgetError: a budget is malformed or out of reach; nothing was evaluated then.
        ConfigError: another argument is unknown, of the wrong type or out of range.
        LatencyError: the team does not share its latency, or a prediction is no positive number.
        EvaluationError: evaluate raised or returned no finite number; the text names the widths. `scores` has what
            was scored before. Or `scores` has what is no score, or one that evaluate does not return any more. Or
            evaluate returns accuracies, by which the widest would be the worst: give `maximize=True`.
        StaleStatisticsError: evaluate switched BatchNorm back to running statistics.

    Example:
        >>> import timm
        >>> from torch.nn import functional as F
        >>> from timm_autoslim import HeldOut, convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> batches = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(2)]
        >>> evaluate = HeldOut(batches, lambda subnet, batch: F.cross_entropy(subnet(batch[0]), batch[1]).item())
        >>> result = search(supernet, {"macs": "90%"}, evaluate, refine="none")
        >>> result.networks[0].cost.macs <= result.networks[0].budget
        True
    """
    kind = MODES.pick(mode)
    RANKINGS.pick(rank)
    passes = REFINEMENTS.pick(refine)
    steps = steps if steps is None else check_integer("steps", steps, ConfigError, also=" or None")
    if on_step is not None:
        check_callable("on_step", on_step, ConfigError, "a callable that takes a Step, or None")
    check_flag("progress", progress)
    draws = make_generator(seed)
    score = Scorer(supernet, evaluate, scores, team, maximize)
    conditions = check_team_conditions(conditions, score.team)
    goals = [Goal(supernet, budget, conditions) for budget in parse_budgets(supernet, budgets, conditions=conditions)]
    ranks = torch.randperm(len(supernet.space), generator=draws).tolist()
    networks: list[Found] = []
    trail: list[Step] = []
    widest = count_cost(supernet, supernet.space.max(), _list_metrics(goals), conditions)
    with show_descent(score, widest, [goal.budget for goal in goals], progress) as bar:
        score.compare_scores()
        score.check_direction()
        descent = kind(supernet, score, rank, steps, dict(zip(supernet.space.names, ranks, strict=True)))
        widest_loss = descent.loss
        for goal in goals:
            for step in _descend(descent, goal, goals, len(trail)):
                trail.append(step)
                bar.show_step(step)
                if on_step is not None:
                    on_step(step)
            widths = descent.refine(goal, passes)
            networks.append(Found.of(SearchResult.SEARCHED, goal, widths, score(widths)))
    settings = {"mode": mode, "rank": rank, "steps": descent.steps, "refine": refine, "seed": int(seed)}
    settings |= {"maximize": True} if maximize else {}
    return SearchResult.of(score, goals, networks, trail, settings, widest_loss)


def _list_metrics(goals: Sequence[Goal]) -> list[str]:
    """Return the metrics that any of the goals limits."""
    return list(dict.fromkeys(metric for goal in goals for metric in goal.budget.metrics))


def _descend(descent: Descent, goal: Goal, goals: Sequence[Goal], index: int) -> Iterator[Step]:
    """Take steps, numbered from `index`, until the goal's budget holds or the narrowest subnet is reached."""
    supernet, metrics = goal.supernet, _list_metrics(goals)
    narrowest = supernet.space.min()
    while descent.widths != narrowest and not goal.budget.holds(before := goal.cost(descent.widths)):
        name = descent.step(goal)
        cost = count_cost(supernet, descent.widths, metrics, goal.conditions)
        metric, limit = goal.budget.tightest(before)
        yield Step(
            index=index,
            group=name,
            width=descent.widths[name],
            loss=descent.loss,
            macs=cost.macs,
            params=cost.params,
            metric=metric,
            budget=limit,
            evaluations=descent.score.evaluations,
            limits=dict(goal.budget.limits),
            spent={metric: cost.pick(metric) for metric in metrics},
        )
        index += 1
