"""ResNet-56 on CIFAR-10, with all images on the GPU: trained, slimmed and fine-tuned."""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim import convert, cost, slim, soft_cross_entropy
from timm_autoslim.recipes.benchmarks.lib.fitting import Loss, Pictures, fit
from timm_autoslim.recipes.benchmarks.lib.images import measure_top1, read_images

Row = dict[str, Any]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH, HELD_OUT = 256, 2500
# MACs of the base over those of the network: as in the tables of most papers on pruning.
RATIOS = {"2.11x": 2.11, "2.57x": 2.57}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv 1512.03385, section 4.2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(branch + self.shortcut(x))


class CifarResNet(nn.Module):
    """The ResNet for 32 px images with 6 n + 2 layers (He et al., arXiv 1512.03385, section 4.2)."""

    def __init__(self, depth: int = 56, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, inputs = [], 16
        for stage, width in enumerate((16, 32, 64)):
            for index in range((depth - 2) // 6):
                blocks.append(ResidualBlock(inputs, width, 2 if stage and not index else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Cifar:
    """CIFAR-10 on one device, normalised.

    Attributes:
        pictures: training images; the last `HELD_OUT` are for searches.
        test: images (M, 3, 32, 32) and classes (M,).
    """

    def __init__(self, folder: Path, device: torch.device, limit: int | None = None) -> None:
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
        parts = []
        for name in ("train", "test"):
            images, targets = read_images(folder / f"{name}.tar", limit)
            pixels = (images.to(device).float() / 255 - mean) / std
            parts.append((pixels.contiguous(memory_format=torch.channels_last), targets.to(device)))
        self.pictures, self.test, self.device = Pictures(*parts[0]), parts[1], device
        self.held = min(HELD_OUT, len(self.pictures.targets) // 4)
        self.count = len(self.pictures.targets) - self.held

    def list_held_out(self, part: int = 500) -> list[tuple[Tensor, Tensor]]:
        """Return the images that no training sees before the search, in parts."""
        images, targets = self.pictures.padded[-self.held :, :, 4:36, 4:36], self.pictures.targets[-self.held :]
        return list(zip(torch.split(images, part), torch.split(targets, part), strict=True))


@functools.cache
def load_cifar(folder: Path, device: str, limit: int | None) -> Cifar:
    """Return the data of a folder, once for all stages."""
    return Cifar(folder, torch.device(device), limit)


def make_loss(teacher: nn.Module | None) -> Loss:
    """Return the cross-entropy; with a teacher the mean of it and of the distance from the teacher's logits."""

    def measure(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        device = images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            outputs = model(images)
            loss = F.cross_entropy(outputs, targets)
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher(images)
                loss = 0.5 * loss + 0.5 * soft_cross_entropy(outputs, taught, temperature=2.0)
        return loss

    return measure


def train(
    model: nn.Module, data: Cifar, count: int, epochs: int, rate: float, path: Path, teacher: nn.Module | None = None
) -> None:
    """Train by SGD with Nesterov momentum, a short warm-up, then a cosine; `path` has what an interrupted one left."""
    start = time.perf_counter()
    torch.backends.cudnn.benchmark = True  # every batch has the same shapes

    def say(epoch: int, loss: float) -> None:
        if epoch % 20 == 0:
            print(f"epoch {epoch}/{epochs}, loss {loss:.3f}, {time.perf_counter() - start:.0f} s")

    fit(
        model, data.pictures, lambda images: images, make_loss(teacher),
        functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4),
        epochs=epochs, batch=BATCH, rate=rate, warmup=2, count=count, on_epoch=say, checkpoint=path,
    )  # fmt: skip


def list_stages(args: argparse.Namespace) -> list[str]:
    """Return the stages, all of which need the base; none without data."""
    return ["base", *RATIOS, "control"] if args.data_dir else []


def make_model(args: argparse.Namespace, data: Cifar) -> nn.Module:
    """Return the network with fresh weights, on the device."""
    torch.manual_seed(0)
    return CifarResNet(8 if args.toy else 56).to(data.device).to(memory_format=torch.channels_last)


def measure_stage(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Train the base; or slim it, and fine-tune the slim network; or, as a control, fine-tune the base alike."""
    data = load_cifar(args.data_dir, args.device, 600 if args.toy else None)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    start, path = time.perf_counter(), args.checkpoints / "base.pt"
    base = make_model(args, data)
    if name == "base":
        train(base, data, data.count, args.epochs[0], 0.2, args.checkpoints / "base-epochs.pt")
        torch.save(base.state_dict(), path)
        yield describe(base, data, start, network="base", epochs=args.epochs[0])
        return
    base.load_state_dict(torch.load(path, map_location=data.device))
    base.eval()
    if name == "control":
        network = copy.deepcopy(base)
    else:
        network = slim_base(base, data, RATIOS[name], args.checkpoints / f"{name}-slim.pt")
    common = {"network": name, "macs": count_macs(network, data), "macs_base": count_macs(base, data)}
    if name != "control":
        yield describe(network, data, start, question="slimmed", **common)
    start, raw = time.perf_counter(), measure_top1(network, data.test)
    epochs, interrupted = args.epochs[1], args.checkpoints / f"{name}-epochs.pt"
    resumed = interrupted.exists()
    train(network, data, len(data.pictures.targets), epochs, 0.1, interrupted, teacher=base)
    yield describe(network, data, start, raw_top1=raw, epochs=epochs, resumed=resumed, **common)
    torch.save(network.state_dict(), args.checkpoints / f"{name}.pt")


def slim_base(base: nn.Module, data: Cifar, ratio: float, path: Path) -> nn.Module:
    """Return a network of so many times fewer MACs; the searches see the held-out images. Nothing is trained.

    It is written to `path`, and read from there if it is there already.
    """
    if path.exists():
        return torch.load(path, map_location=data.device, weights_only=False)  # type: ignore[no-any-return]
    network = slim(base, f"{100 / ratio:.4g}%", data.list_held_out(), F.cross_entropy, progress=False)
    network = network.to(memory_format=torch.channels_last)
    torch.save(network, path)
    return network


def count_macs(network: nn.Module, data: Cifar) -> int:
    """Return the multiply-accumulates of an image."""
    return cost(convert(network, torch.zeros(1, 3, 32, 32, device=data.device))).macs


def describe(model: nn.Module, data: Cifar, start: float, **more: Any) -> Row:
    """Return a row of a network: its accuracy on test images, its parameters, and the seconds since `start`."""
    seconds, params = time.perf_counter() - start, sum(p.numel() for p in model.parameters())
    return {"question": "cifar10", "top1": measure_top1(model, data.test), "params": params, "seconds": seconds, **more}


def make_table(rows: list[Row]) -> str:
    """Return the table of networks; empty if there are no rows."""
    tuned = [row["network"] for row in rows if row.get("question") == "cifar10"]
    slimmed = [row for row in rows if row.get("question") == "slimmed" and row["network"] not in tuned]
    rows = [row for row in rows if row.get("question") == "cifar10"] + [row | {"epochs": 0} for row in slimmed]
    if len(rows) < 2:  # the base alone says nothing
        return ""
    lines = [
        "| ResNet-56 | MACs | params | reconstructed, before fine-tuning | epochs | test top-1 | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = f"{row['macs'] / 1e6:.1f}M (1/{row['macs_base'] / row['macs']:.2f})" if "macs" in row else "1"
        raw = f"{row['raw_top1']:.2f}" if "raw_top1" in row else ""
        cells = [
            row["network"],
            share,
            f"{row['params'] / 1e6:.3f}M",
            raw,
            str(row["epochs"]),
            f"{row['top1']:.2f}",
            "" if row.get("resumed") else f"{row['seconds']:.0f}",  # else those of the last call alone
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
