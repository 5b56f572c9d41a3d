"""What a file holds that `SearchResult.save` wrote: parsed and checked, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from timm_autoslim.costs.cost import Cost
from timm_autoslim.costs.metrics import METRICS
from timm_autoslim.errors import ArtifactError, WidthError
from timm_autoslim.slimming.json_reader import JsonValue
from timm_autoslim.slimming.network import Found, Step
from timm_autoslim.supernet.widths import ChannelGroup, Widths, hash_groups

FORMAT = 1
SOURCE = "a file that SearchResult.save wrote"


def parse_result(content: JsonValue, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of the fields of a `SearchResult`, which have these names.

    Raises:
        ArtifactError: a part is missing, unknown or wrong; the text says where.
    """
    number = content.members().get("format", JsonValue(f"{content.where}.format", None))
    if number.value != FORMAT:
        number.refuse(f"format {FORMAT}, of {SOURCE}")
    parts = content.object(["format", "method", *names])
    groups = _parse_groups(parts["groups"])
    networks = [_parse_network(item, parts["method"].text(), groups) for item in parts["networks"].items()]
    if not networks:
        parts["networks"].refuse("at least one network")
    return {
        "networks": tuple(networks),
        "steps": tuple(_parse_step(item, groups) for item in parts["steps"].items()),
        "evaluations": parts["evaluations"].integer(),
        "evaluated_macs": parts["evaluated_macs"].integer(),
        "images": parts["images"].integer(),
        "groups": groups,
        "widest": _parse_cost(parts["widest"]),
        "widest_loss": None if parts["widest_loss"].value is None else parts["widest_loss"].number(),
        "macs_by_module": {path: macs.integer() for path, macs in parts["macs_by_module"].members().items()},
        "settings": {name: _parse_setting(value) for name, value in parts["settings"].members().items()},
        "base": None if parts["base"].value is None else parts["base"].text(),
        "seconds": None if parts["seconds"].value is None else parts["seconds"].number(-1.0),
    }


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
