"""What a search or a baseline chose, as values that a file can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from timm_autoslim.costs.cost import Cost, cost_by_module, count_cost
from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.errors import ArtifactError, BudgetError, WidthError
from timm_autoslim.slimming.goals import Goal
from timm_autoslim.slimming.json_reader import JsonValue
from timm_autoslim.slimming.scoring import Scorer
from timm_autoslim.supernet.widths import ChannelGroup, Widths, hash_groups
from timm_autoslim.utils.arguments import check_path
from timm_autoslim.utils.files import write_text
from timm_autoslim.utils.html import make_html_table

FORMAT = 1
_FILE = "a file that SearchResult.save wrote"


@dataclass(frozen=True)
class Step:
    """One step of a descent: `group` was slimmed to `width`, and then the subnet had this loss and cost.

    In the fast mode the loss is that on the part of the held-out images which this step looked at.

    Attributes:
        index: which step it is.
        group, width: what was slimmed.
        loss, macs, params: of the subnet after the step.
        metric, budget: the limit of the next budget on the way down that was furthest exceeded before the step.
        evaluations: subnets scored so far.
        limits: all limits of that budget, by metric.
        spent: what the subnet costs, in all metrics that any budget of the search limits.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert, search
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> result = search(supernet, {"macs": "95%"}, lambda subnet: 0.0)
        >>> for step in result.steps:
        ...     print(f"{step.index}: {step.group} to {step.width}, loss {step.loss:.2f}")
        0: conv1.6 to 56, loss 0.00
    """

    index: int
    group: str
    width: int
    loss: float
    macs: int
    params: int
    metric: str
    budget: float
    evaluations: int
    limits: Mapping[str, float] = field(hash=False)
    spent: Mapping[str, float] = field(hash=False)


@dataclass(frozen=True)
class Found:
    """The network that a method chose for one budget.

    Attributes:
        method: "searched", or a key of `BASELINES`.
        metric, budget: the limit of which the network uses the largest share.
        text: the budget as the user wrote it, such as "macs<=60%".
        widths, cost, loss: the network; its cost has MACs, parameters and the metrics of the budget. Where the search
            maximised a score, the loss is its negative.
        limits: all limits of the budget, by metric.
        macs_by_module: the network's MACs by module, in the order of execution.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert, search
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> result = search(supernet, {"macs": ["60%", "40%"]}, lambda subnet: 0.0, refine="none")
        >>> for network in result.networks:
        ...     print(network.text, network.cost.macs <= network.budget)
        macs<=60% True
        macs<=40% True
        >>> model = supernet.extract(result.networks[0].widths)
    """

    method: str
    metric: str
    budget: float
    text: str
    widths: Widths
    cost: Cost
    loss: float
    limits: Mapping[str, float] = field(hash=False)
    macs_by_module: Mapping[str, int] = field(hash=False, repr=False)

    @classmethod
    def of(cls, method: str, goal: Goal, widths: Widths, loss: float) -> Found:
        """Return the network of these widths, which a method chose for a goal.

        Raises:
            BudgetError: the network is above the budget: the latency was predicted lower before, for the same widths.
        """
        cost, budget = goal.cost(widths), goal.budget
        for metric, limit in budget.exceeded(cost):
            got = f"{cost.pick(metric):,} {metric}, where it was at most {limit:,} before"
            needed = f"the same {metric} for the same widths at every prediction"
            raise BudgetError.at("the network", got=got, needed=needed)
        by_module = cost_by_module(goal.supernet, widths)
        return cls(method, *budget.tightest(cost), budget.text, widths, cost, loss, dict(budget.limits), by_module)

    @property
    def name(self) -> str:
        """A name of the budget and the method, such as `macs-60pct-params-2M-searched`."""
        slug = self.text.replace(" and ", "-").replace("<=", "-").replace("%", "pct")
        return f"{slug}-{self.method}"

    def to_dict(self) -> dict[str, Any]:
        """Return the network for JSON; the method is that of the result that holds it."""
        values = {key: getattr(self, key) for key in ("metric", "budget", "text", "loss")}
        return {
            **values,
            "cost": self.cost.to_dict(),
            "limits": dict(self.limits),
            "widths": self.widths.to_dict(),
            "macs_by_module": dict(self.macs_by_module),
        }


@dataclass(frozen=True)
class SearchResult:
    """What a search or a baseline chose: one network for each budget, and all that a report shows of them.

    Attributes:
        networks: one for each budget, the largest share of the widest first; all of one method.
        steps: the descent; empty for a baseline.
        evaluations: number of subnets scored.
        evaluated_macs: their forward work: images times MACs, added up.
        images: the most images that one subnet was scored on.
        groups: the search space.
        widest: the cost of the widest subnet, in all metrics that a budget limits.
        widest_loss: the loss of the widest, where the descent begins; None for a baseline, which has none.
        macs_by_module: the widest's MACs by module, in the order of execution.
        settings: the arguments of the search or baseline that shape its result.
        base: the name of the model, if it is known.
        seconds: how long it took, if the caller says so: `dataclasses.replace(result, seconds=...)`.

    Example:
        >>> import tempfile, timm, torch
        >>> from timm_autoslim import baseline, convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> result = baseline(supernet, {"macs": "50%"}, lambda subnet: 0.0, "uniform")
        >>> result.names
        ('macs-50pct-uniform',)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result.save(Path(folder) / "uniform.json")
        ...     SearchResult.load(Path(folder) / "uniform.json") == result
        True
    """

    SEARCHED: ClassVar[str] = "searched"  # the method of what `search` returns; all others are baselines

    networks: tuple[Found, ...]
    steps: tuple[Step, ...]
    evaluations: int
    evaluated_macs: int
    images: int
    groups: tuple[ChannelGroup, ...] = field(repr=False)
    widest: Cost
    widest_loss: float | None
    macs_by_module: Mapping[str, int] = field(hash=False, repr=False)
    settings: Mapping[str, Any] = field(hash=False)
    base: str | None = None
    seconds: float | None = None

    @classmethod
    def of(
        cls,
        score: Scorer,
        goals: list[Goal],
        networks: list[Found],
        steps: list[Step],
        settings: Mapping[str, Any],
        widest_loss: float | None = None,
    ) -> SearchResult:
        """Return the result of the method that chose the networks, after all was scored."""
        supernet, metrics = score.supernet, dict.fromkeys(m for goal in goals for m in goal.budget.metrics)
        widest = count_cost(supernet, supernet.space.max(), metrics, goals[0].conditions)
        return cls(
            tuple(networks),
            tuple(steps),
            score.evaluations,
            score.macs,
            score.images,
            supernet.space.groups,
            widest,
            widest_loss,
            cost_by_module(supernet),
            settings,
            supernet.base,
        )

    @property
    def method(self) -> str:
        """What chose the networks: "searched", or a key of `BASELINES`."""
        return self.networks[0].method

    @property
    def maximize(self) -> bool:
        """Whether a score was maximised: the losses are negative scores."""
        return self.settings.get("maximize") is True

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budget of each network, as the user wrote it."""
        return tuple(network.text for network in self.networks)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each network."""
        return tuple(network.name for network in self.networks)

    def list_narrowest(self, network: Found) -> tuple[str, ...]:
        """Return the groups that a network has at their least width: a lower or higher `min=` would change it."""
        return tuple(group.name for group in self.groups if network.widths[group.name] <= group.choices[0])

    def join(self, later: SearchResult) -> SearchResult | None:
        """Return this result with the networks and the steps of a search that went on from one of its networks.

        Their widths are told in the groups of this search space. A group that had nothing left to lose keeps the width
        of the network that the later search began with.

        Returns:
            The joint result; None if the later search began with no network of this one.
        """
        sizes = {group.name: group.size for group in later.groups}
        starts = [{group.name: group.size for group in self.groups}, *(n.widths.to_dict() for n in self.networks)]
        start = next((start for start in reversed(starts) if sizes.items() <= start.items()), None)
        if start is None:
            return None
        key = hash_groups(self.groups)
        networks = []
        for network in later.networks:
            widths = start | network.widths.to_dict()
            values = tuple(widths[group.name] for group in self.groups)
            networks.append(replace(network, widths=Widths(values, self.groups, key)))
        steps = [
            replace(step, index=len(self.steps) + number, evaluations=self.evaluations + step.evaluations)
            for number, step in enumerate(later.steps)
        ]
        return replace(
            self,
            networks=(*self.networks, *networks),
            steps=(*self.steps, *steps),
            evaluations=self.evaluations + later.evaluations,
            evaluated_macs=self.evaluated_macs + later.evaluated_macs,
            images=max(self.images, later.images),
            seconds=None if None in (self.seconds, later.seconds) else (self.seconds or 0) + (later.seconds or 0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        keys = ("method", "evaluations", "evaluated_macs", "images", "widest_loss", "base", "seconds")
        return {
            **{key: getattr(self, key) for key in keys},
            "settings": dict(self.settings),
            "widest": self.widest.to_dict(),
            "macs_by_module": dict(self.macs_by_module),
            "groups": [{**asdict(g), "choices": [*g.choices], "producers": [*g.producers]} for g in self.groups],
            "networks": [network.to_dict() for network in self.networks],
            "steps": [asdict(step) for step in self.steps],
        }

    def _repr_html_(self) -> str:
        rows: list[list[object]] = [["", "original", self.widest.macs, self.widest.params, self.widest_loss or ""]]
        rows += [[n.text, n.method, n.cost.macs, n.cost.params, n.loss] for n in self.networks]
        caption = f"{self.evaluations:,} subnets scored"
        return make_html_table(["budget", "network", "MACs", "parameters", "held-out loss"], rows, caption)

    def save(self, path: str | Path) -> None:
        """Write the result as one JSON file, whole or not at all; missing folders are made.

        Raises:
            OSError: the file cannot be written.
            ArtifactError: the path is none.
        """
        path = check_path("path", path, ArtifactError)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"format": FORMAT, **self.to_dict()}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read a result that `save` wrote: `SearchResult.load(path) == result`.

        Raises:
            ArtifactError: the file cannot be read, or holds no result of this format; the text says what is wrong.
        """
        return _parse_result(JsonValue.read(check_path("path", path, ArtifactError), _FILE))


# -- reading a file -------------------------------------------------------------------------------------------------


def _parse_result(content: JsonValue) -> SearchResult:
    number = content.members().get("format", JsonValue(f"{content.where}.format", None))
    if number.value != FORMAT:
        number.refuse(f"format {FORMAT}, of {_FILE}")
    parts = content.object(["format", "method", *(item.name for item in fields(SearchResult))])
    groups = _parse_groups(parts["groups"])
    networks = [_parse_network(item, parts["method"].text(), groups) for item in parts["networks"].items()]
    if not networks:
        parts["networks"].refuse("at least one network")
    return SearchResult(
        networks=tuple(networks),
        steps=tuple(_parse_step(item, groups) for item in parts["steps"].items()),
        evaluations=parts["evaluations"].integer(),
        evaluated_macs=parts["evaluated_macs"].integer(),
        images=parts["images"].integer(),
        groups=groups,
        widest=_parse_cost(parts["widest"]),
        widest_loss=None if parts["widest_loss"].value is None else parts["widest_loss"].number(),
        macs_by_module={path: macs.integer() for path, macs in parts["macs_by_module"].members().items()},
        settings={name: _parse_setting(value) for name, value in parts["settings"].members().items()},
        base=None if parts["base"].value is None else parts["base"].text(),
        seconds=None if parts["seconds"].value is None else parts["seconds"].number(-1.0),
    )


def _parse_groups(content: JsonValue) -> tuple[ChannelGroup, ...]:
    groups = tuple(_parse_group(item) for item in content.items())
    if not groups or len({group.name for group in groups}) < len(groups):
        content.refuse("at least one group, each with another name")
    return groups


def _parse_group(content: JsonValue) -> ChannelGroup:
    parts = content.object([item.name for item in fields(ChannelGroup)])
    numbers = {key: parts[key].integer(1) for key in ("size", "min", "divisor", "channels", "floor")}
    choices = tuple(item.integer(1) for item in parts["choices"].items())
    producers = tuple(item.text() for item in parts["producers"].items())
    return ChannelGroup(name=parts["name"].text(), choices=choices, producers=producers, **numbers)


def _parse_network(content: JsonValue, method: str, groups: tuple[ChannelGroup, ...]) -> Found:
    parts = content.object([item.name for item in fields(Found) if item.name != "method"])
    cost, limits = _parse_cost(parts["cost"]), _parse_metrics(parts["limits"], above=0.0)
    if not limits or not limits.keys() <= cost.to_dict().keys():
        parts["limits"].refuse(f"limits in metrics of the cost: {list(cost.to_dict())}")
    if parts["metric"].text() not in limits:
        parts["metric"].refuse(f"one of {list(limits)}")
    widths = parts["widths"].object([group.name for group in groups])
    values = tuple(widths[group.name].integer(1) for group in groups)
    try:
        subnet = Widths(values, groups, hash_groups(groups))
    except WidthError as error:
        raise ArtifactError(f"{parts['widths'].where}: {error}") from None
    return Found(
        method=method,
        metric=parts["metric"].text(),
        budget=parts["budget"].number(above=0.0),
        text=parts["text"].text(),
        widths=subnet,
        cost=cost,
        loss=parts["loss"].number(),
        limits=limits,
        macs_by_module={path: macs.integer() for path, macs in parts["macs_by_module"].members().items()},
    )


def _parse_step(content: JsonValue, groups: tuple[ChannelGroup, ...]) -> Step:
    parts = content.object([item.name for item in fields(Step)])
    names = [group.name for group in groups]
    if parts["group"].text() not in names:
        parts["group"].refuse("the name of a group")
    limits = _parse_metrics(parts["limits"], above=0.0)
    if parts["metric"].text() not in limits:
        parts["metric"].refuse(f"one of {list(limits)}")
    numbers = {key: parts[key].integer() for key in ("index", "width", "macs", "params", "evaluations")}
    return Step(
        group=parts["group"].text(),
        loss=parts["loss"].number(),
        metric=parts["metric"].text(),
        budget=parts["budget"].number(above=0.0),
        limits=limits,
        spent=_parse_metrics(parts["spent"]),
        **numbers,
    )


def _parse_cost(content: JsonValue) -> Cost:
    parts = content.object(["macs", "params"], optional=["peak_bytes", "latency_ms"])
    integers = {key: parts[key].integer() for key in ("macs", "params", "peak_bytes") if key in parts}
    return Cost(**integers, latency_ms=parts["latency_ms"].number(0.0) if "latency_ms" in parts else None)


def _parse_metrics(content: JsonValue, above: float = -1.0) -> dict[str, float]:
    return {name: part.number(above) for name, part in content.object([], optional=list(METRICS)).items()}


def _parse_setting(content: JsonValue) -> Any:
    if not isinstance(content.value, str | int | float | None):
        content.refuse("a text, a number, true, false or null")
    return content.value
