"""Outputs of any structure: what a loss reads of them, and how subnets learn from them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timm_autoslim.errors import ConfigError
from timm_autoslim.training.distillation import DISTILLATION_LOSSES, DistillFn, soft_cross_entropy
from timm_autoslim.utils.tensors import collect_tensors, map_tensors


@dataclass(frozen=True)
class Asked:
    """The argument that compares outputs, in errors.

    Attributes:
        name: of the argument.
        got: what was given.
        remedy: what to give in its place.
    """

    name: str
    got: str
    remedy: str


DISTILL = Asked(
    "distill",
    "a loss of logits",
    "give distill= a function of your own, distill(outputs, teacher), of what the model returns",
)
_LOSS = Asked(
    "outputs", "no logits", "give a loss of your own: slim(..., loss), or HeldOut(batches, score) for a search"
)


def detach(outputs: Any) -> Any:
    """Return a copy of outputs whose tensors are detached."""
    return outputs.detach() if isinstance(outputs, Tensor) else map_tensors(Tensor.detach, outputs)


def separate(outputs: Any) -> Any:
    """Return outputs whose tensors do not depend on each other, for `find_read`."""
    return outputs if isinstance(outputs, Tensor) else map_tensors(lambda tensor: tensor.view_as(tensor), outputs)


def find_read(loss: Tensor, outputs: Any) -> tuple[int, ...]:
    """Return which tensors of outputs a loss was computed from, by their order; `outputs` are from `separate`."""
    if isinstance(outputs, Tensor):
        return (0,)
    places = [i for i, tensor in enumerate(collect_tensors(outputs)) if tensor.requires_grad]
    if not places or not loss.requires_grad:
        return tuple(places)
    tensors = [collect_tensors(outputs)[i] for i in places]
    gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return tuple(i for i, gradient in zip(places, gradients, strict=True) if gradient is not None)


def compare_logits(outputs: Any, targets: Any) -> Tensor:
    """Return the cross-entropy of a model's logits with another's probabilities, a scalar.

    Args:
        outputs: logits (N, classes), or maps of logits (N, classes, H, W); of several tensors the mean is taken.
        targets: the other model's logits, of the same structure.

    Raises:
        ConfigError: they are no logits, or do not fit each other.
    """
    return compare(soft_cross_entropy, outputs, targets, range(len(collect_tensors(outputs))), _LOSS)


def compare(distill: DistillFn, outputs: Any, teacher: Any, read: Sequence[int], asked: Asked = DISTILL) -> Tensor:
    """Return the distillation loss of outputs, a scalar.

    A function of the user's gets outputs and teacher as they are. One of `DISTILLATION_LOSSES` compares logits: the
    mean over the tensors that the loss of the widest reads, each with the teacher's at the same place.

    Args:
        distill: the loss.
        outputs: of a subnet.
        teacher: what it learns from, of the same structure or one tensor for all; detached.
        read: which tensors of the outputs the loss of the widest reads.
        asked: the argument that errors name.

    Raises:
        ConfigError: the tensors do not fit a loss of logits, or each other.
    """
    if not compares_logits(distill) or (isinstance(outputs, Tensor) and isinstance(teacher, Tensor)):
        if compares_logits(distill):
            _check_shapes([(outputs, teacher)], asked)
        return distill(outputs, teacher)
    pairs = _pair(outputs, teacher, read)
    _check_shapes(pairs, asked)
    kinds = {(t.dim(), t.shape[1]) for t, _ in pairs}
    if not pairs or (len(pairs) > 1 and (len(kinds) > 1 or min(kinds)[0] not in (2, 4))):
        shapes = [tuple(tensor.shape) for tensor, _ in pairs] or "no tensor"
        got = f"{asked.got}, and outputs of the shapes {shapes}"
        needed = "logits (N, classes), or maps of logits (N, classes, H, W) of the same classes"
        raise ConfigError.at(asked.name, got=got, needed=needed, remedy=asked.remedy)
    return torch.stack([distill(tensor, target) for tensor, target in pairs]).mean()


def compares_logits(distill: object) -> bool:
    """Whether a loss is one of `DISTILLATION_LOSSES`, perhaps with settings."""
    while isinstance(distill, functools.partial):
        distill = distill.func
    return any(distill is loss for loss in DISTILLATION_LOSSES.values())


def _pair(outputs: Any, teacher: Any, read: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return each tensor that the loss reads with what it learns from."""
    tensors, targets = collect_tensors(outputs), collect_tensors(teacher)
    if len(targets) == 1:
        return [(tensors[i], targets[0]) for i in read]
    if len(targets) == len(tensors):
        return [(tensors[i], targets[i]) for i in read]
    raise ConfigError.at(
        "teacher",
        got=f"{len(targets)} tensors",
        needed=f"one tensor, or {len(tensors)} as the model returns",
        remedy="pick one, as in teacher=lambda inputs: model(inputs)[0]",
    )


def _check_shapes(pairs: Sequence[tuple[Tensor, Tensor]], asked: Asked) -> None:
    for tensor, target in pairs:
        if tensor.shape != target.shape:
            raise ConfigError.at(
                asked.name,
                got=f"{asked.got}, and outputs of the shape {tuple(tensor.shape)} for {tuple(target.shape)}",
                needed="a loss of features, whose width shrinks with the subnet",
                remedy=f"{asked.remedy}, or keep the width by keep_output=True",
            )
        if tensor.dim() == 3:
            got = f"{asked.got}, and outputs of the shape {tuple(tensor.shape)}"
            needed = "logits (N, classes) or (N, classes, H, W): of three dimensions any may be the classes"
            raise ConfigError.at(asked.name, got=got, needed=needed, remedy=asked.remedy)
        if tensor.dim() < 2 or tensor.shape[1] < 2:
            got = f"{asked.got}, and outputs of the shape {tuple(tensor.shape)}"
            needed = "logits (N, classes) of at least two classes: the softmax of one is always 1"
            more = "" if tensor.dim() else "; a loss among the outputs is left out where the inputs hold no labels"
            raise ConfigError.at(asked.name, got=got, needed=needed, remedy=asked.remedy + more)
