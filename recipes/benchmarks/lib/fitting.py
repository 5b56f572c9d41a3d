"""Training on images that lie on the device: cropped and flipped there, and on a GPU replayed as a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, images (N, 3, H, W), classes (N,) -> scalar


class Pictures:
    """Images for training, with a border of zeros from which crops are drawn.

    Attributes:
        padded: (N, C, H + 8, W + 8), as bytes or floats.
        targets: classes (N,).
    """

    def __init__(self, images: Tensor, targets: Tensor, border: float = 0.0) -> None:
        self.padded, self.targets = F.pad(images, (4, 4, 4, 4), value=border), targets
        self.size = images.shape[-1]

    def draw(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images of these indices (N,), cropped and flipped at random, and their classes."""
        device, count = self.padded.device, len(chosen)
        top, left = (torch.randint(9, (count, 1), generator=generator).to(device) for _ in range(2))
        flip = torch.randint(2, (count, 1), generator=generator).to(device).bool()
        chosen, steps = chosen.to(device), torch.arange(self.size, device=device)
        columns = left + torch.where(flip, self.size - 1 - steps, steps)  # (N, W)
        images = self.padded[chosen[:, None, None], :, (top + steps)[:, :, None], columns[:, None, :]]  # (N, H, W, C)
        return images.permute(0, 3, 1, 2), self.targets[chosen]


class TrainingStep:
    """One training step on a batch of fixed size; on a GPU a CUDA graph of it.

    The optimizer's learning rate is a tensor there, which `set_rate` writes to.
    """

    def __init__(self, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, example: Tensor) -> None:
        self.model, self.measure, self.optimizer = model, loss, optimizer
        self.images = torch.zeros_like(example)
        self.targets = torch.zeros(len(example), dtype=torch.long, device=example.device)
        self.loss = torch.zeros((), device=example.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if example.is_cuda:
            self._capture()

    def __call__(self, images: Tensor, targets: Tensor) -> None:
        """Train on images (N, C, H, W) and classes (N,)."""
        self.images.copy_(images)
        self.targets.copy_(targets)
        if self.graph:
            self.graph.replay()
        else:
            self._run()

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def write(self, path: Path, generator: torch.Generator, epoch: int) -> None:
        """Write all that training goes on from: weights, the optimizer's state, random numbers, the epoch."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"],
                 "generator": generator.get_state(), "epoch": epoch}  # fmt: skip
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def read(self, path: Path, generator: torch.Generator) -> int:
        """Read such a file; return its epoch. Tensors keep their places, since a graph writes to them."""
        state = torch.load(path, map_location=self.images.device)
        self.model.load_state_dict(state["model"])
        generator.set_state(state["generator"].cpu())
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, saved in state["optimizer"].items():
            tensors = self.optimizer.state[parameters[index]]
            for name, value in saved.items():
                if isinstance(tensors.get(name), Tensor):
                    tensors[name].copy_(value)
                else:
                    tensors[name] = value
        return int(state["epoch"])

    def _run(self) -> None:
        self.optimizer.zero_grad()
        loss = self.measure(self.model, self.images, self.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _capture(self) -> None:
        """Record the graph; the runs that warm up leave the weights as they were."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for _ in range(3):
                self._run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(self.graph):
            self._run()
        self.model.load_state_dict(state)
        for tensors in self.optimizer.state.values():
            for tensor in tensors.values():
                if isinstance(tensor, Tensor):
                    tensor.zero_()


def fit(
    model: nn.Module, pictures: Pictures, prepare: Callable[[Tensor], Tensor], loss: Loss,
    make_optimizer: Callable[..., torch.optim.Optimizer], *, epochs: float, batch: int, rate: float, warmup: float = 0,
    count: int | None = None, seed: int = 0, on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None, every: int | None = None,
) -> int:  # fmt: skip
    """Train with a linear warm-up of the learning rate, then a cosine to 0.

    Args:
        model: trained in place, in training mode.
        pictures: the images.
        prepare: makes inputs (N, 3, H, W) of images.
        loss: the loss of a batch.
        make_optimizer: called with the parameters, `lr=` and, on a GPU, what a CUDA graph needs.
        epochs: their number; of the last one only a part, if it is no integer.
        batch, rate: as their names say.
        warmup: epochs of the warm-up.
        count: how many of the first images are trained on.
        seed: of order, crops and flips.
        on_epoch: called with the epoch and the loss of its last step.
        checkpoint: a file that is written after every tenth of the epochs. Where it is there already, training goes on
            from it, as if it had not been interrupted.
        every: epochs between two writes of it, in place of a tenth.

    Returns:
        How many images the steps saw.
    """
    device, count = pictures.padded.device, len(pictures.targets) if count is None else count
    batch = min(batch, count)
    on_gpu = device.type == "cuda"
    graphed: dict[str, Any] = {"lr": torch.tensor(0.0, device=device), "fused": True} if on_gpu else {"lr": rate}
    generator = torch.Generator().manual_seed(seed)
    example = prepare(pictures.draw(torch.arange(batch), torch.Generator().manual_seed(0))[0])
    step = TrainingStep(model.train(), loss, make_optimizer(model.parameters(), **graphed), example)
    updates, first, every = count // batch, 0, every or max(1, int(epochs) // 10)
    steps = round(epochs * updates)
    if checkpoint is not None and checkpoint.exists():
        first = step.read(checkpoint, generator)
    for epoch in range(first, math.ceil(epochs)):
        order = torch.randperm(count, generator=generator)
        for index, chosen in enumerate(torch.split(order[: min(updates, steps - epoch * updates) * batch], batch)):
            share = (epoch + index / updates) / epochs
            rising = min(share * epochs / warmup, 1.0) if warmup else 1.0
            step.set_rate(rate * rising * 0.5 * (1 + math.cos(math.pi * share)))
            images, targets = pictures.draw(chosen, generator)
            step(prepare(images), targets)
        if on_epoch is not None:
            on_epoch(epoch + 1, step.loss.item())
        if checkpoint is not None and (epoch + 1) % every == 0:
            step.write(checkpoint, generator, epoch + 1)
    return steps * batch
