"""The networks of a searched run: RUN/search/METHOD.json, one file for each method."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from timm_autoslim import BASELINES, Cost, SearchResult, Widths
from timm_autoslim.errors import ConfigError

SEARCHED = "searched"  # the method of search.py itself; all others are baselines


@dataclass(frozen=True)
class Network:
    """One network of a search.

    Attributes:
        name: by budget and method, such as `macs-50pct-searched`.
        method: "searched", or the name of a baseline.
        budget: as the user wrote it, such as `macs<=50%`.
        limits: of the budget, by metric.
        widths, cost: of the network.
        loss: on the held-out images.
    """

    name: str
    method: str
    budget: str
    limits: Mapping[str, float]
    widths: Widths
    cost: Cost
    loss: float


def write_results(run: Path, results: dict[str, SearchResult]) -> None:
    """Write the results of all methods; the search itself comes last, and marks the end."""
    folder = run / "search"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.json"):  # of a search that was killed while it wrote them
        path.unlink()
    for method in [*(method for method in results if method != SEARCHED), SEARCHED]:
        results[method].save(folder / f"{method}.json")


def is_searched(run: Path) -> bool:
    """Whether a search of this run has come to its end."""
    return (run / "search" / f"{SEARCHED}.json").is_file()


def read_networks(run: Path) -> dict[str, Network]:
    """Read the networks of a run by name: budget by budget, the searched one first.

    Raises:
        ConfigError: no search has come to its end.
    """
    if not is_searched(run):
        raise ConfigError(f"{run} holds no search/{SEARCHED}.json: search first: python recipes/search.py {run}")
    paths = {method: run / "search" / f"{method}.json" for method in (SEARCHED, *BASELINES)}
    results = {method: SearchResult.load(path) for method, path in paths.items() if path.is_file()}
    return {network.name: network for network in list_networks(results)}


def list_networks(results: Mapping[str, SearchResult]) -> list[Network]:
    """Return the networks of all methods, budget by budget."""
    rows = [[_describe(result, index) for index in range(len(result.networks))] for result in results.values()]
    return [network for column in zip(*rows, strict=True) for network in column]


def _describe(result: SearchResult, index: int) -> Network:
    found, name = result.networks[index], result.names[index]
    return Network(name, result.method, found.text, found.limits, found.widths, found.cost, found.loss)


def find_network(run: Path, name: str | None) -> Network:
    """Return one network of a run by its name.

    Raises:
        ConfigError: no search has come to its end, or it has no network of this name.
    """
    networks = read_networks(run)
    if name not in networks:
        near = difflib.get_close_matches(str(name), networks, n=1, cutoff=0.0)[0]
        raise ConfigError(f"--network {name}: {run}/search has {', '.join(networks)}. Did you mean {near}?")
    return networks[name]
