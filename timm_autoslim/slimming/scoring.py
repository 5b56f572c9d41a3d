"""Score subnets on held-out images: each once, counted, by one process or several; most of the time of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.costs.cost import Latency, check_supernet, cost
from timm_autoslim.errors import AutoSlimError, ConfigError, DataError, EvaluationError, LatencyError
from timm_autoslim.supernet.space import Widths
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.training.calibration import batch_statistics, check_batch_statistics
from timm_autoslim.utils.arguments import check_integer
from timm_autoslim.utils.tensors import collect_tensors

Subnet = Callable[[Tensor], Tensor]
Evaluate = Callable[[Subnet], float]


class HeldOut:
    """An `evaluate` in parts, so that a search can score a candidate on some of the held-out images first.

    Called like any other `evaluate`, it returns the mean over all parts, each counting the same.

    Args:
        batches: the parts; each should hold several hundred images, for it is normalised by its own statistics.
        score: `score(subnet, batch)`, the error or loss of a callable subnet on one of them, a float.

    Raises:
        DataError: there are no batches, or they cannot be counted and taken by index.
    """

    def __init__(self, batches: Sequence[Any], score: Callable[[Subnet, Any], float]) -> None:
        if not (hasattr(batches, "__len__") and hasattr(batches, "__getitem__")) or isinstance(batches, Mapping):
            raise DataError(
                f"HeldOut() got a {type(batches).__name__} of batches; needed: a sequence, which gives the same "
                "batches again and again, such as list(loader)"
            )
        if not callable(score):
            raise DataError(f"HeldOut() got score={score!r}; needed: a callable score(subnet, batch)")
        if not len(batches):
            raise DataError("HeldOut() got no batches; needed: at least one batch of held-out images.")
        self.batches, self.score = batches, score

    def __call__(self, subnet: Subnet) -> float:
        """Return the mean over all parts."""
        return math.fsum(float(self.score(subnet, batch)) for batch in self.batches) / len(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class Team:
    """Processes that share the scoring of a search; all of them call it, with the same arguments.

    Attributes:
        index, count: which process this is, of how many.
        gather: takes a list, and returns the lists of all processes one after the other, by index; such as
            `accelerate.utils.gather_object`.

    Raises:
        ConfigError: there is no process of this index among so many.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[list[Any]], list[Any]] = list

    def __post_init__(self) -> None:
        check_integer("Team.count", self.count, ConfigError)
        check_integer("Team.index", self.index, ConfigError, 0, self.count - 1)


class SharedLatency:
    """A latency for a team: the first process predicts, and the others take its word.

    No two processes measure the same times, and a search goes one way only if all of them go by the same. They must ask
    for the same subnets in the same order, as those of a search do; what was asked for once is known everywhere.
    """

    def __init__(self, latency: Latency | None, team: Team) -> None:
        """Share what `latency` predicts, such as a `LatencyTable`; processes but the first need none."""
        if latency is None and team.index == 0:
            raise LatencyError("SharedLatency() got no latency in the first process; needed: a LatencyTable there")
        self.latency, self.team = latency, team
        self._known: dict[Widths, float] = {}

    def predict(self, supernet: Supernet, widths: Widths) -> float:
        """Return milliseconds for one batch, the same in all processes.

        Raises:
            AutoSlimError: what the prediction raised in the first process, in all of them; a LatencyError if that
                was another exception.
        """
        if widths not in self._known:
            said: list[Any] = []
            if self.team.index == 0 and self.latency is not None:
                try:
                    said.append(self.latency.predict(supernet, widths))
                except AutoSlimError as error:  # the others wait for this one, and must be told
                    said.append(error)
                except Exception as error:  # a full disk, for example; not every exception can be sent
                    failed = LatencyError(f"predicting the latency raised {type(error).__name__}: {error}")
                    failed.__cause__ = error
                    said.append(failed)
            (answer,) = self.team.gather(said)
            if isinstance(answer, AutoSlimError):
                raise answer
            self._known[widths] = answer
        return self._known[widths]


# Error of a subnet on one part, and how many images it ran on, by the widths and the part; plain data, for JSON.
Scores = MutableMapping[str, Sequence[float]]
_Job = tuple[Widths, int]


class Scorer:
    """Scores subnets with batch-statistics BatchNorm, each once, and counts what that costs.

    Attributes:
        parts: into how many parts `evaluate` can be divided.
        evaluations: subnets scored so far, on some parts or on all.
        macs: forward work of them, images times MACs.

    Raises:
        ConfigError: an argument of the wrong type.
        EvaluationError: `scores` holds what no search has written.
        LatencyError: a latency that the processes of the team do not share.
    """

    def __init__(
        self, supernet: Supernet, evaluate: Evaluate, scores: Scores | None = None, team: Team | None = None
    ) -> None:
        check_supernet(supernet)
        if not isinstance(team, Team | None):
            raise ConfigError(f"got team={team!r}; needed: a Team, or None")
        if not isinstance(scores, MutableMapping | None):
            raise ConfigError(f"got scores of type {type(scores).__name__}; needed: a dict, or None")
        for key, value in (scores or {}).items():
            if not is_score(value):
                raise EvaluationError(
                    f"scores[{key!r}]: got {value!r}; needed: [error, images], a finite number and how many images; "
                    "take the entry out, or remove the file that it comes from, and it is scored anew"
                )
        self.supernet, self.evaluate, self.team = supernet, evaluate, Team() if team is None else team
        latency = supernet.conditions.latency
        if self.team.count > 1 and latency is not None and not isinstance(latency, SharedLatency):
            raise LatencyError(
                f"supernet.conditions.latency: got a {type(latency).__name__} in {self.team.count} processes, each of "
                "which would go by its own times; needed: Conditions(latency=SharedLatency(table, team))"
            )
        self.parts = len(evaluate) if isinstance(evaluate, HeldOut) else 1
        self.macs = 0
        self._scores: Scores = {} if scores is None else scores
        self._used: dict[Widths, set[int]] = {}

    @property
    def evaluations(self) -> int:
        """Return the number of subnets scored so far."""
        return len(self._used)

    def __call__(self, widths: Widths) -> float:
        """Return the error of the subnet of these widths, on all parts; raises as `many` does."""
        return self.many([widths])[0]

    def many(self, subnets: Sequence[Widths], parts: int | None = None) -> list[float]:
        """Return the error of each subnet, on the first `parts` parts or on all.

        What was scored before is not scored again; the rest is divided among the processes of the team.

        Raises:
            EvaluationError: evaluate raised or returned no finite number; the text names the widths.
            StaleStatisticsError: evaluate switched BatchNorm back to running statistics.
        """
        chosen = range(self.parts if parts is None else min(parts, self.parts))
        jobs = [(widths, part) for widths in dict.fromkeys(subnets) for part in chosen]
        self._run([job for job in jobs if _key(job) not in self._scores])
        for widths, part in jobs:
            used = self._used.setdefault(widths, set())
            if part not in used:  # scores known from an earlier, interrupted search count as well
                used.add(part)
                self.macs += int(self._scores[_key((widths, part))][1]) * cost(self.supernet, widths).macs
        return [math.fsum(self._scores[_key((w, part))][0] for part in chosen) / len(chosen) for w in subnets]

    def _run(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        team = self.team
        done: list[tuple[str, Any]] = []
        for job in jobs[team.index :: team.count]:
            try:
                self._scores[_key(job)] = found = self._scored(job)  # at once: kept even if the process ends now
                done.append((_key(job), found))
            except AutoSlimError as error:  # the other processes wait for this one, and must be told
                done.append((_key(job), error))
                break
        if team.count > 1:
            done = team.gather(done)
        failed: AutoSlimError | None = None
        for key, result in done:
            if isinstance(result, AutoSlimError):
                failed = failed or result
            else:
                self._scores[key] = result
        if failed is not None:
            raise failed

    def _scored(self, job: _Job) -> list[float]:
        widths, part = job
        model, training = self.supernet.model, self.supernet.training
        try:
            with torch.no_grad(), self.supernet.at(widths), batch_statistics(model), _counted(model) as images:
                if isinstance(self.evaluate, HeldOut):
                    error = float(self.evaluate.score(self.supernet, self.evaluate.batches[part]))
                else:
                    error = float(self.evaluate(self.supernet))
                check_batch_statistics(model)
        except AutoSlimError:
            raise
        except Exception as cause:  # whatever the user's callable raises, the widths must be named
            raise EvaluationError(
                f"evaluate raised {type(cause).__name__}: {cause}; at the widths {widths.to_dict()}"
            ) from cause
        finally:
            self.supernet.training = training  # the wrapper's own flag, which evaluate may have moved
        if not math.isfinite(error):
            raise EvaluationError(
                f"evaluate returned {error}; needed: a finite error or loss; at the widths {widths.to_dict()}"
            )
        return [error, sum(images)]


def _key(job: _Job) -> str:
    widths, part = job
    return f"{','.join(map(str, widths.values_))}:{part}"


def is_score(value: Any) -> bool:
    """Whether this is what a search keeps of a subnet: a finite error, and of how many images."""
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(isinstance(v, bool) for v in value):
        return False
    error, images = value
    return isinstance(error, Real) and math.isfinite(error) and isinstance(images, int) and images >= 0


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[int]]:
    """Collect, for the length of a block, how many images each forward of the model takes."""
    images: list[int] = []

    def count(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next((t for t in collect_tensors((inputs, named)) if t.dim()), None)
        images.append(1 if first is None else len(first))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield images
    finally:
        handle.remove()
