"""Score subnets on held-out images: each once, counted, by one process or several; most of the time of a search."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.costs.cost import check_supernet
from timm_autoslim.errors import AutoSlimError, ConfigError, EvaluationError
from timm_autoslim.slimming.held_out import Evaluate, HeldOut
from timm_autoslim.slimming.team import Team
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.training.calibration import batch_statistics, check_batch_statistics
from timm_autoslim.utils.arguments import check_callable, check_flag, quote
from timm_autoslim.utils.restoring import restoring
from timm_autoslim.utils.tensors import collect_tensors

# How much worse than the narrowest the widest may score, as a share of the larger number. Held-out losses of untrained
# supernets differ by a few per cent either way, and so a loss is never refused. Accuracies taken for losses differ by
# several per cent after a good training, and by far more after a short one.
WARN_FROM, REFUSE_FROM = 0.05, 1 / 3
# How far two scores of one subnet may differ, on another device or with other kernels, as a share of the larger one; of
# counts, so many images.
SAME_SCORE, SAME_IMAGES = 0.01, 2
# Why a trained model may do worse than a slice of it.
_UNFIT = (
    "look at whether each batch has a hundred images or more, of most classes (its BatchNorm statistics count here, so "
    "mix them), and whether mean, std, size and targets are those that the model was trained with"
)


# What `evaluate` returned for a subnet on one part, and how many images it ran on, by widths and part; for JSON.
Scores = MutableMapping[str, Sequence[float]]
_Job = tuple[Widths, int]


def check_scores(scores: Mapping[str, Any]) -> None:
    """Raise EvaluationError if a value is no score: a finite loss, and how many images it is of.

    Example:
        >>> check_scores({"16,16,32:0": [0.5, 64]})
    """
    if not isinstance(scores, Mapping):
        raise EvaluationError.at("scores", got=quote(scores), needed="a dict of scores")
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
        maximize: whether higher is better in what `evaluate` returns; its negative is the loss then.
        on_score: called after each score of this process; set from outside, None for nothing.

    Raises:
        ConfigError: an argument of the wrong type.
        EvaluationError: `scores` holds what no search has written.
    """

    def __init__(
        self,
        supernet: Supernet,
        evaluate: Evaluate,
        scores: Scores | None = None,
        team: Team | None = None,
        maximize: bool = False,
    ) -> None:
        check_supernet(supernet)
        needed = "a callable that takes a subnet and returns its loss, or a HeldOut"
        check_callable("evaluate", evaluate, ConfigError, needed)
        check_flag("maximize", maximize)
        if not isinstance(team, Team | None):
            raise ConfigError.at("team", got=repr(team), needed="a Team, or None")
        if not isinstance(scores, MutableMapping | None):
            raise ConfigError.at("scores", got=f"a {type(scores).__name__}", needed="a dict, or None")
        check_scores(scores or {})
        self.supernet, self.evaluate, self.team = supernet, evaluate, Team() if team is None else team
        self.maximize = maximize
        self.on_score: Callable[[], object] | None = None
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
        sign = -1.0 if self.maximize else 1.0
        return [sign * math.fsum(self._scores[_key((w, part))][0] for part in numbers) / len(numbers) for w in subnets]

    def compare_scores(self) -> None:
        """Score anew two of the subnets that have a score already, and make sure that they are the same.

        One is the narrowest: the widest has the same loss with its channels in another order.

        Raises:
            EvaluationError: the scores are of other weights, other images or another metric; or as `many` does.
        """
        jobs = [job for key in self._scores if (job := self._read_key(key)) is not None]
        if not jobs:
            return
        for job in dict.fromkeys((jobs[0], min(jobs, key=lambda job: sum(job[0].values_)))):
            before, now = self._scores[_key(job)], self._score(job)
            if not _are_same(before, now):
                raise EvaluationError.at(
                    f"scores[{_key(job)!r}]",
                    got=f"{before[0]:.6g} on {before[1]} images, where evaluate returns {now[0]:.6g} on {now[1]}",
                    needed="scores of the same weights, channel order, images and metric as in this search",
                    remedy="give an empty dict, or remove the file that they come from, and all is scored anew",
                )

    def _read_key(self, key: str) -> _Job | None:
        """Return the subnet and the part that a key names; None if it is of another supernet, or of more parts."""
        text, _, part = key.rpartition(":")
        try:
            values = dict(zip(self.supernet.space.names, map(int, text.split(",")), strict=True))
            widths, number = self.supernet.space.from_dict(values), int(part)
        except ValueError:  # a WidthError too
            return None
        return (widths, number) if 0 <= number < self.parts else None

    def check_direction(self, *, trained: bool = False) -> None:
        """Score the widest and the narrowest subnet on the first part, and make sure that `maximize` is the right way.

        It warns if the widest is clearly worse than the narrowest. Where it is worse by far, it refuses what is no loss
        for sure: numbers of which each is a count or a share of the images, as accuracies are; and any number if the
        supernet is that of a trained model, which the narrowest slice of it cannot surpass.

        Args:
            trained: whether the supernet is that of a trained model, and only to refuse, not to warn.

        Raises:
            EvaluationError: they are the wrong way round; or as `many` does.
        """
        subnets = self.supernet.space.max(), self.supernet.space.min()
        widest, narrowest = self.many(subnets, 1)
        gap = (widest - narrowest) / max(abs(widest), abs(narrowest), 1e-12)
        if gap <= WARN_FROM:
            return
        (wide, of_wide), (narrow, of_narrow) = (self._scores[_key((widths, 0))] for widths in subnets)
        way, other, what, change = (
            ("higher", "lower", "a loss", "leave out maximize=True")
            if self.maximize
            else ("lower", "higher", "an accuracy", "give maximize=True")
        )
        error = EvaluationError.at(
            "evaluate",
            got=f"{wide:.4g} for the widest subnet and {narrow:.4g} for the narrowest, as if the widest were worse",
            needed=f"numbers that are {way} for better subnets",
            remedy=f"if {other} is better in what it returns, as for {what}, {change}"
            + (f"; else {_UNFIT}" if trained else ""),
        )
        if isinstance(self.evaluate, HeldOut) and self.evaluate.compares_outputs:
            error = EvaluationError.at(
                "batches",
                got=f"{wide:.4g} between the outputs of the original and of the widest subnet, which differs in its "
                f"BatchNorm statistics alone, and {narrow:.4g} for the narrowest",
                needed="a widest subnet that is near the original",
                remedy=_UNFIT,
            )
        counts = _counts_images(wide, of_wide) and _counts_images(narrow, of_narrow)
        if gap > REFUSE_FROM and (trained or counts):
            raise error
        if self.team.index == 0 and not trained:
            text = f"{error}; else the supernet is untrained, or training spoils its widest subnet"
            warnings.warn(text, UserWarning, stacklevel=3)

    def _run(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        team = self.team
        results: list[tuple[str, Any]] = []
        for job in jobs[team.index :: team.count]:
            try:
                self._scores[_key(job)] = score = self._score(job)  # at once: kept even if the process ends now
                results.append((_key(job), score))
                if self.on_score is not None:
                    self.on_score()
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
                    loss = _read_number(self.evaluate.score(self.supernet, self.evaluate.batches[part]))
                else:
                    loss = _read_number(self.evaluate(self.supernet))
                check_batch_statistics(model)
        except AutoSlimError:
            raise
        except Exception as cause:  # the user's callable may raise anything, and the widths must be named
            if isinstance(cause, ValueError) and "more than 1 value per channel" in str(cause):
                raise EvaluationError.at(
                    "evaluate",
                    got="a batch of one image, of which a BatchNorm gets a single value per channel",
                    needed="two images or more in each batch, better hundreds: subnets are scored with the statistics "
                    "of the batch, and one value has no variance",
                    remedy="join the batch to another, or leave it out, as drop_last=True in a DataLoader does",
                ) from cause
            raise EvaluationError(
                f"evaluate raised {type(cause).__name__}: {cause}; at the widths {widths.to_dict()}"
            ) from cause
        finally:
            self.supernet.training = training  # the supernet's own flag, which evaluate may have changed
            torch.clear_autocast_cache()  # which would hold every slice as long as the caller's autocast lasts
        if not math.isfinite(loss):
            raise EvaluationError(f"evaluate returned {loss}; needed: a finite loss; at the widths {widths.to_dict()}")
        return [loss, sum(images)]


def _read_number(value: Any) -> float:
    """Return what `evaluate` returned as a float.

    Raises:
        EvaluationError: it is a tensor of several numbers.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        got, needed = f"a tensor of the shape {tuple(value.shape)}", "one number for all images"
        raise EvaluationError.at(
            "evaluate", got=got, needed=needed, remedy='leave out reduction="none", or take .mean()'
        )
    return float(value)


def _are_same(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether two scores [loss, images] of one subnet differ by no more than rounding brings about."""
    (loss, images), (loss_now, images_now) = before, now
    slack = SAME_SCORE * max(abs(loss), abs(loss_now)) + 1e-6
    if _counts_images(loss, images) and _counts_images(loss_now, images_now):
        one = 1 / images if max(loss, loss_now) <= 1 else 1.0 if loss == round(loss) else 100 / images
        slack = max(slack, SAME_IMAGES * one * (1 + 1e-9))
    return images == images_now and abs(loss - loss_now) <= slack


def _counts_images(value: float, images: float) -> bool:
    """Whether a number is a count of images or a share of them: k, k / images or 100 k / images, for a whole k.

    The odds that two losses are so by chance are about one in a hundred thousand.
    """
    counts = (value, value * images, value * images / 100)
    return images > 0 and any(0 <= n <= images and abs(n - round(n)) <= 1e-6 * images for n in counts)


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

    def restore() -> None:  # not by the handle, which an interrupt may come before
        for number in [number for number, hook in model._forward_pre_hooks.items() if hook is count]:
            model._forward_pre_hooks_with_kwargs.pop(number, None)
            model._forward_pre_hooks.pop(number, None)

    with restoring(restore):
        model.register_forward_pre_hook(count, with_kwargs=True)
        yield images
