"""What a search or a baseline chose, and all that a report shows of it, as a value that a file can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from timm_autoslim.costs.cost import Cost, cost_by_module, count_cost
from timm_autoslim.errors import ArtifactError
from timm_autoslim.slimming.goals import Goal
from timm_autoslim.slimming.json_reader import JsonValue
from timm_autoslim.slimming.network import Found, Step
from timm_autoslim.slimming.result_reader import FORMAT, SOURCE, parse_result
from timm_autoslim.slimming.scoring import Scorer
from timm_autoslim.supernet.widths import ChannelGroup, Widths, hash_groups
from timm_autoslim.utils.arguments import check_path
from timm_autoslim.utils.files import write_text
from timm_autoslim.utils.html import make_html_table


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
        content = JsonValue.read(check_path("path", path, ArtifactError), SOURCE)
        return cls(**parse_result(content, [item.name for item in fields(cls)]))
