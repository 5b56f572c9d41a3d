"""Several processes that run one search together: they share the scoring, and go by the same latencies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm_autoslim.costs.conditions import Conditions, Latency, check_conditions, check_latency
from timm_autoslim.errors import AutoSlimError, ConfigError, LatencyError
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.utils.arguments import check_callable, check_integer, check_type


@dataclass(frozen=True)
class Team:
    """Processes that share the scoring of a search; all of them call it, with the same arguments.

    Attributes:
        index, count: which process this is, of how many.
        gather: takes a list, and returns the lists of all processes one after the other, by index; such as
            `accelerate.utils.gather_object`.

    Raises:
        ConfigError: there is no process of this index among so many, or `gather` cannot be called.

    Example:
        >>> from accelerate import PartialState
        >>> from accelerate.utils import gather_object
        >>> state = PartialState()
        >>> team = Team(state.process_index, state.num_processes, gather_object)
        >>> team.index, team.count
        (0, 1)
    """

    index: int = 0
    count: int = 1
    gather: Callable[[list[Any]], list[Any]] = list

    def __post_init__(self) -> None:
        check_integer("Team.count", self.count, ConfigError)
        check_integer("Team.index", self.index, ConfigError, 0, self.count - 1)
        check_callable("Team.gather", self.gather, ConfigError, "a callable that takes a list and returns a list")


class SharedLatency:
    """A latency for a team: the first process predicts, and the others get its prediction.

    No two processes measure the same times, and a search goes one way only if all of them go by the same. They must ask
    for the same subnets in the same order, as those of a search do; each subnet is predicted once.

    Example:
        >>> from timm_autoslim import Conditions, LatencyTable
        >>> team = Team()  # in a real team, processes other than the first give None in place of a table
        >>> conditions = Conditions(latency=SharedLatency(LatencyTable(), team))
    """

    def __init__(self, latency: Latency | None, team: Team) -> None:
        """Share what `latency` predicts, such as a `LatencyTable`; processes other than the first need none.

        Raises:
            LatencyError: the first process has none, or what it has predicts nothing.
            ConfigError: the team is no `Team`.
        """
        check_type("team", team, Team, ConfigError, "a Team")
        if latency is None and team.index == 0:
            raise LatencyError.at(
                "SharedLatency()", got="no latency in the first process", needed="a LatencyTable there"
            )
        check_latency(latency, LatencyError)
        self.latency, self.team = latency, team
        self._predictions: dict[Widths, float] = {}

    def predict(self, supernet: Supernet, widths: Widths) -> float:
        """Return milliseconds for one batch, the same in all processes.

        Raises:
            AutoSlimError: what the prediction raised in the first process, in all of them; a LatencyError if that
                was another exception.
        """
        if widths not in self._predictions:
            answers: list[Any] = []
            if self.team.index == 0 and self.latency is not None:
                try:
                    answers.append(self.latency.predict(supernet, widths))
                except AutoSlimError as error:  # the others wait for this one, and must be told
                    answers.append(error)
                except Exception as error:  # a full disk, for example; not every exception can be sent
                    failure = LatencyError(f"predicting the latency raised {type(error).__name__}: {error}")
                    failure.__cause__ = error
                    answers.append(failure)
            (answer,) = self.team.gather(answers)
            if isinstance(answer, AutoSlimError):
                raise answer
            self._predictions[widths] = answer
        return self._predictions[widths]


def check_team_conditions(conditions: Conditions | None, team: Team) -> Conditions:
    """Return the conditions of a search; None is one image, in the model's type.

    Raises:
        ConfigError: they are no `Conditions`.
        LatencyError: each process of the team would predict its own latencies.
    """
    conditions = check_conditions(conditions)
    latency = conditions.latency
    if team.count > 1 and latency is not None and not isinstance(latency, SharedLatency):
        got = f"a {type(latency).__name__} in {team.count} processes, each of which would predict other times"
        needed = "Conditions(latency=SharedLatency(table, team))"
        raise LatencyError.at("conditions.latency", got=got, needed=needed)
    return conditions
