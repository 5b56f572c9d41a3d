"""The training step of train.py: the sandwich rule, as the flags say."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_autoslim import DISTILLATION_LOSSES, SAMPLERS, SearchSpace, Widths, sandwich_step
from timm_autoslim.recipes.lib.trainer import Backward
from timm_autoslim.recipes.lib.training import make_loss


class Sandwich:
    """The supernet's training step, as the flags say."""

    def __init__(
        self, accelerator: Accelerator, args: argparse.Namespace, space: SearchSpace, *,
        teacher: nn.Module | None = None, updates: int = 0,
    ) -> None:  # fmt: skip
        """Take the flags, and what they need.

        Args:
            accelerator: Accelerate's.
            args: the flags.
            space: the supernet's search space.
            teacher: what all subnets but the widest learn from, on the device; None: from the widest.
            updates: of the complete training, of which --sandwich-delay is a share.
        """
        self.accelerator, self.args, self.space = accelerator, args, space
        self.loss_fn = make_loss(args)
        self.sample = functools.partial(SAMPLERS[args.sampler], space)
        distill = DISTILLATION_LOSSES[args.distill_loss]
        self.distill = functools.partial(distill, temperature=args.distill_temperature)
        self.teacher = self._autocast(teacher) if teacher else None
        self.delay = round(args.sandwich_delay * updates)  # updates that train the widest alone

    def _autocast(self, teacher: nn.Module) -> Callable[[Tensor], Tensor]:
        def teach(inputs: Tensor) -> Tensor:
            with self.accelerator.autocast():
                logits: Tensor = teacher(inputs)
            return logits

        return teach

    def seed_generator(self, update: int) -> torch.Generator:
        """Seed by (seed, update): every process draws the same widths, and a resumed run those of the uninterrupted."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + update)

    def __call__(
        self, network: nn.Module, inputs: Tensor, targets: Tensor, update: int, backward: Backward
    ) -> dict[str, Tensor | None]:
        """Add the gradients of one batch; returns the losses. All batches of an update have the same widths."""
        widest_alone = update < self.delay
        step = sandwich_step(
            network, self.space, inputs, targets, self.loss_fn, generator=self.seed_generator(update),
            n=self.args.sandwich, sample=self.sample, distill=self.distill, teacher=self.teacher,
            teach_widest=self.args.teach_widest, only_widest=widest_alone,
            regularize_widest_only=self.args.regularize_widest_only, sizes=self.args.subnet_sizes,
            backward=backward, no_sync=lambda: self.accelerator.no_sync(network),
        )  # fmt: skip
        losses = {"widest_loss": step.losses[0], "narrowest_loss": None if widest_alone else step.losses[1]}
        if len(step.losses) > 2:
            losses["random_loss"] = torch.stack(step.losses[2:])  # (n - 2,)
        return losses

    def sample_widths(self, update: int) -> list[Widths]:
        """Return the widths of the random subnets of one update."""
        generator = self.seed_generator(update)
        return [self.sample(generator) for _ in range(self.args.sandwich - 2)]

    def describe(self, name: str, index: int, update: int) -> str:
        """Say which subnet had a loss."""
        if name != "random_loss":
            return f"the {name.removesuffix('_loss')} subnet"
        return f"the random subnet with the widths {json.dumps(self.sample_widths(update)[index].to_dict())}"
