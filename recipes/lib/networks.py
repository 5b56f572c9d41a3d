"""The networks of a searched run: RUN/search/METHOD.json, one file for each method."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from timm_autoslim import BASELINES, Found, SearchResult
from timm_autoslim.errors import ConfigError

SEARCHED = SearchResult.SEARCHED


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


def read_networks(run: Path) -> dict[str, Found]:
    """Read the networks of a run by name: budget by budget, the searched one first.

    Raises:
        ConfigError: no search has come to its end.
    """
    if not is_searched(run):
        raise ConfigError(f"{run} holds no search/{SEARCHED}.json: search first: python recipes/search.py {run}")
    paths = {method: run / "search" / f"{method}.json" for method in (SEARCHED, *BASELINES)}
    results = {method: SearchResult.load(path) for method, path in paths.items() if path.is_file()}
    return {network.name: network for network in list_networks(results)}


def list_networks(results: Mapping[str, SearchResult]) -> list[Found]:
    """Return the networks of all methods, budget by budget."""
    columns = zip(*(result.networks for result in results.values()), strict=True)
    return [network for column in columns for network in column]


def find_network(run: Path, name: str | None) -> Found:
    """Return one network of a run by its name.

    Raises:
        ConfigError: no search has come to its end, or it has no network of this name.
    """
    networks = read_networks(run)
    if name is None:
        raise ConfigError(f"--network is needed: one of {', '.join(networks)}.")
    if name not in networks:
        near = difflib.get_close_matches(name, networks, n=1, cutoff=0.0)[0]
        raise ConfigError(f"--network {name}: {run}/search has {', '.join(networks)}. Did you mean {near}?")
    return networks[name]
