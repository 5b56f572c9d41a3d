"""Score subnets on held-out images: each once, counted, by one process or several; most of the time of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.costs.cost import check_supernet
from timm_autoslim.errors import AutoSlimError, ConfigError, DataError, EvaluationError
from timm_autoslim.slimming.team import Team
from timm_autoslim.supernet.space import Widths
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.training.calibration import batch_statistics, check_batch_statistics
from timm_autoslim.utils.tensors import collect_tensors

Subnet = Callable[[Tensor], Tensor]
Evaluate = Callable[[Subnet], float]


class HeldOut:
    """An `evaluate` in parts, so that a search can score a candidate on some of the held-out images first.

    Called like any other `evaluate`, it returns the mean over all parts, each counting the same.

    Args:
        batches: the parts; each should hold several hundred images, for it is normalised by its own statistics.
        score: `score(subnet, batch)`, the loss of a callable subnet on one of them, a float.

    Raises:
        DataError: there are no batches, or they cannot be counted and taken by index.

    Example:
        >>> from torch.nn import functional as F
        >>> batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)]
        >>> evaluate = HeldOut(batches, lambda subnet, batch: F.cross_entropy(subnet(batch[0]), batch[1]).item())
        >>> len(evaluate)
        4
    """

    def __init__(self, batches: Sequence[Any], score: Callable[[Subnet, Any], float]) -> None:
        if not (hasattr(batches, "__len__") and hasattr(batches, "__getitem__")) or isinstance(batches, Mapping):
            got = f"a {type(batches).__name__} of batches"
            needed = "a sequence, which gives the same batches again and again, such as list(loader)"
            raise DataError.at("HeldOut()", got=got, needed=needed)
        if not callable(score):
            raise DataError.at("HeldOut()", got=f"score={score!r}", needed="a callable score(subnet, batch)")
        if not len(batches):
            raise DataError.at("HeldOut()", got="no batches", needed="at least one batch of held-out images")
        self.batches, self.score = batches, score

    def __call__(self, subnet: Subnet) -> float:
        """Return the mean over all parts."""
        return math.fsum(float(self.score(subnet, batch)) for batch in self.batches) / len(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


# Loss of a subnet on one part, and how many images it ran on, by the widths and the part; for JSON.
Scores = MutableMapping[str, Sequence[float]]
_Job = tuple[Widths, int]


def check_scores(scores: Mapping[str, Any]) -> None:
    """Raise EvaluationError if a value is no score: a finite loss, and how many images it is of.

    Example:
        >>> check_scores({"16,16,32:0": [0.5, 64]})
    """
    for key, value in scores.items():
        if not _is_score(value):
            needed = "[loss, images], a finite number and how many images"
            remedy = "take the entry out, or remove the file that it comes from, and it is scored anew"
            raise EvaluationError.at(f"scores[{key!r}]", got=repr(value), needed=needed, remedy=remedy)


def _is_score(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(isinstance(v, bool) for v in value):
        return False
    loss, images = value
    return isinstance(loss, Real) and math.isfinite(loss) and isinstance(images, int) and images >= 0


class Scorer:
    """Scores subnets with batch-statistics BatchNorm, each once, and counts what that costs.

    Attributes:
        parts: into how many parts `evaluate` can be divided.
        evaluations: subnets scored so far, on some parts or on all.
        images: the most images that one subnet was scored on so far.
        macs: forward work of all scores, images times MACs.

    Raises:
        ConfigError: an argument of the wrong type.
        EvaluationError: `scores` holds what no search has written.
    """

    def __init__(
        self, supernet: Supernet, evaluate: Evaluate, scores: Scores | None = None, team: Team | None = None
    ) -> None:
        check_supernet(supernet)
        if not isinstance(team, Team | None):
            raise ConfigError.at("team", got=repr(team), needed="a Team, or None")
        if not isinstance(scores, MutableMapping | None):
            raise ConfigError.at("scores", got=f"a {type(scores).__name__}", needed="a dict, or None")
        check_scores(scores or {})
        self.supernet, self.evaluate, self.team = supernet, evaluate, Team() if team is None else team
        self.parts = len(evaluate) if isinstance(evaluate, HeldOut) else 1
        self.macs = self.images = 0
        self._scores: Scores = {} if scores is None else scores
        self._used: dict[Widths, dict[int, int]] = {}  # images by part

    @property
    def evaluations(self) -> int:
        """Return the number of subnets scored so far."""
        return len(self._used)

    def __call__(self, widths: Widths) -> float:
        """Return the loss of the subnet of these widths, on all parts; raises as `many` does."""
        return self.many([widths])[0]

    def many(self, subnets: Sequence[Widths], parts: int | None = None) -> list[float]:
        """Return the loss of each subnet, on the first `parts` parts or on all.

        What was scored before is not scored again; the rest is divided among the processes of the team.

        Raises:
            EvaluationError: evaluate raised or returned no finite number; the text names the widths.
            StaleStatisticsError: evaluate switched BatchNorm back to running statistics.
        """
        numbers = range(self.parts if parts is None else min(parts, self.parts))
        jobs = [(widths, part) for widths in dict.fromkeys(subnets) for part in numbers]
        self._run([job for job in jobs if _key(job) not in self._scores])
        for widths, part in jobs:
            used = self._used.setdefault(widths, {})
            if part not in used:  # scores from an earlier, interrupted search count as well
                used[part] = int(self._scores[_key((widths, part))][1])
                self.macs += used[part] * self.supernet.graph.macs(widths.values_)
                self.images = max(self.images, sum(used.values()))
        return [math.fsum(self._scores[_key((w, part))][0] for part in numbers) / len(numbers) for w in subnets]

    def _run(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        team = self.team
        results: list[tuple[str, Any]] = []
        for job in jobs[team.index :: team.count]:
            try:
                self._scores[_key(job)] = score = self._score(job)  # at once: kept even if the process ends now
                results.append((_key(job), score))
            except AutoSlimError as error:  # the other processes wait for this one, and must be told
                results.append((_key(job), error))
                break
        if team.count > 1:
            results = team.gather(results)
        failure: AutoSlimError | None = None
        for key, result in results:
            if isinstance(result, AutoSlimError):
                failure = failure or result
            else:
                self._scores[key] = result
        if failure is not None:
            raise failure

    def _score(self, job: _Job) -> list[float]:
        widths, part = job
        model, training = self.supernet.model, self.supernet.training
        try:
            with torch.no_grad(), self.supernet.at(widths), batch_statistics(model), _count_images(model) as images:
                if isinstance(self.evaluate, HeldOut):
                    loss = float(self.evaluate.score(self.supernet, self.evaluate.batches[part]))
                else:
                    loss = float(self.evaluate(self.supernet))
                check_batch_statistics(model)
        except AutoSlimError:
            raise
        except Exception as cause:  # the user's callable may raise anything, and the widths must be named
            raise EvaluationError(
                f"evaluate raised {type(cause).__name__}: {cause}; at the widths {widths.to_dict()}"
            ) from cause
        finally:
            self.supernet.training = training  # the supernet's own flag, which evaluate may have changed
            torch.clear_autocast_cache()  # which would hold every slice as long as the caller's autocast lasts
        if not math.isfinite(loss):
            raise EvaluationError(f"evaluate returned {loss}; needed: a finite loss; at the widths {widths.to_dict()}")
        return [loss, sum(images)]


def _key(job: _Job) -> str:
    widths, part = job
    return f"{','.join(map(str, widths.values_))}:{part}"


@contextmanager
def _count_images(model: nn.Module) -> Iterator[list[int]]:
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
