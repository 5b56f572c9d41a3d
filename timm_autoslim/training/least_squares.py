"""Least squares for one layer: its rows of inputs and outputs, their moments, and the weights that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim.slicing.tensors import Axis, take_slice
from timm_autoslim.utils.moments import Moments, Sums
from timm_autoslim.utils.processes import Pool, pool_alone

# Each layer gets so many rows for each input, but no fewer than this; more change little.
ROWS_PER_INPUT, LEAST_ROWS = 8, 32768
_HELD_OUT = 5  # every fifth image tests
_TOGETHER = 1 << 20  # numbers


@dataclass(frozen=True)
class Layer:
    """A layer of the slim model.

    Attributes:
        name: its path.
        module: a linear layer, or a convolution.
        centered: the mean of its outputs does not matter, since a BatchNorm follows that subtracts it.
        reason: why its weights are left; None if they can be solved for.
    """

    name: str
    module: nn.Linear | nn.Conv1d | nn.Conv2d
    centered: bool
    reason: str | None = None

    @property
    def inputs(self) -> int:
        """How many numbers one output is a sum over."""
        return self.module.weight[0].numel()


def take_rows(module: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return what each output of a layer is a sum over: (G, N, P, I), for inputs as the layer takes them.

    Args:
        module: the layer.
        inputs: what enters it.
        positions: (P,) numbers of positions of the output, or of tokens; all of them if None.
    """
    inputs = _add_batch(module, inputs)
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(1, len(inputs), -1, inputs.shape[-1])
        return rows if positions is None else rows.index_select(2, positions)
    windows = _view_windows(module, inputs)
    width = windows.shape[3]
    windows = windows.flatten(2, 3) if positions is None else windows[:, :, positions // width, positions % width]
    rows = windows.transpose(1, 2).flatten(2)  # (N, P, C kh kw)
    return torch.unflatten(rows, 2, (_count_groups(module), -1)).permute(2, 0, 1, 3)


def _view_windows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what the kernel of a convolution sees at each position of its output: (N, C, H, W, kh, kw)."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    padding = [int(value) for value in module.padding for _ in range(2)]
    windows = F.pad(inputs, padding[::-1]) if any(padding) else inputs
    for dim, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        windows = windows.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return windows[:, :, None, :, None] if isinstance(module, nn.Conv1d) else windows


def take_outputs(module: nn.Module, outputs: Tensor, positions: Tensor | None = None, channels: Axis = None) -> Tensor:
    """Return the outputs of a layer as (G, N, P, O), G groups of the layer.

    Args:
        module: the layer.
        outputs: what leaves it, or a layer that has more channels.
        positions: as for `take_rows`.
        channels: those of the outputs that are the layer's; all of them if None.
    """
    outputs, linear = _add_batch(module, outputs), isinstance(module, nn.Linear)
    outputs = outputs.reshape(len(outputs), -1, outputs.shape[-1]) if linear else outputs.flatten(2)
    if positions is not None:
        outputs = outputs.index_select(1 if linear else 2, positions)
    outputs = take_slice(outputs, (None, None, channels) if linear else (None, channels, None))
    return outputs[None] if linear else torch.unflatten(outputs, 1, (_count_groups(module), -1)).permute(1, 0, 3, 2)


def _count_groups(module: nn.Module) -> int:
    return int(getattr(module, "groups", 1))


def _add_batch(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return inputs or outputs of a layer with a batch of one image, if they have none."""
    has_batch = tensor.dim() > 1 + len(getattr(module, "kernel_size", ()))
    return tensor if has_batch else tensor[None]


def have_same_rows(module: nn.Module, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether inputs and outputs have the same images and positions: both may be channels of other layers."""
    rows = take_rows(module, _add_batch(module, inputs)[:1].float())
    return rows.shape[2] == _count_rows(module, outputs)[1]


def _count_rows(module: nn.Module, outputs: Tensor) -> tuple[int, int]:
    """Return how many images a layer's outputs are of, and of how many positions or tokens each."""
    outputs = _add_batch(module, outputs)
    lengths = outputs.shape[1:-1] if isinstance(module, nn.Linear) else outputs.shape[2:]
    return len(outputs), math.prod(lengths)


def get_weight(module: nn.Module) -> Tensor:
    """Return the weight of a layer as (G, I, O)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = _count_groups(module)
    return weight.detach().reshape(groups, len(weight) // groups, -1).transpose(1, 2)


def set_weight(module: nn.Module, weight: Tensor, shift: Tensor | None) -> None:
    """Set the weight (G, I, O) and, if it has one, the bias (G, O) of a layer."""
    assert isinstance(module.weight, Tensor)
    with torch.no_grad():
        module.weight.copy_(weight.transpose(1, 2).reshape(module.weight.shape))
        if shift is not None and isinstance(module.bias, Tensor):
            module.bias.copy_(shift.reshape(-1))


def sum_moments(
    layer: Layer, inputs: list[Tensor], outputs: list[Tensor], channels: Axis = None, pool: Pool = pool_alone
) -> tuple[Moments, Moments]:
    """Return the moments of four images of five, and those of the fifth.

    Args:
        layer: the layer.
        inputs: by batch, what enters it.
        outputs: by batch, what should come out of it, among other channels.
        channels: those of the outputs that are the layer's; all of them if None.
        pool: adds up over processes.
    """
    module, device = layer.module, inputs[0].device
    limit = max(ROWS_PER_INPUT * layer.inputs, LEAST_ROWS)
    counts = [_count_rows(module, y) for y in outputs]
    (total,) = pool([torch.tensor(float(sum(map(math.prod, counts))), device=device)])
    parts: list[_Rows] = []
    first, generator = 0, torch.Generator().manual_seed(0)
    for x, y, (images, positions) in zip(inputs, outputs, counts, strict=True):
        share = max(1, min(positions, round(positions * limit / int(total))))
        sample = torch.randperm(positions, generator=generator)[:share].to(device) if share < positions else None
        rows, targets = take_rows(module, x, sample).float(), take_outputs(module, y, sample, channels).float()
        numbers = range(first, first + images)
        first += images
        for part, tests in enumerate((False, True)):
            members = [i for i, number in enumerate(numbers) if (number % _HELD_OUT == _HELD_OUT - 1) == tests]
            indexes = torch.tensor(members, dtype=torch.long, device=device)
            r, t = (values.index_select(1, indexes).flatten(1, 2) for values in (rows, targets))
            if not parts:
                parts = [_Rows(r, t), _Rows(r, t)]
            parts[part].add(r, t)
    solving, testing = (part.read(pool) for part in parts)
    return solving, testing


class _Rows:
    """Rows of several batches, multiplied together: products of few rows are slow."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        """Begin with nothing; (G, R, I) and (G, R, O) are rows near the mean."""
        self._sums, self._waiting = Sums(x.mean(1), y.mean(1)), [(x[:, :0], y[:, :0])]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows of inputs (G, R, I) and outputs (G, R, O), both in float32."""
        self._waiting.append((x, y))
        if sum(inputs.numel() for inputs, _ in self._waiting) >= _TOGETHER:
            self._multiply()

    def _multiply(self) -> None:
        x, y = (torch.cat(values, 1) for values in zip(*self._waiting, strict=True))
        self._sums.add(x, y)
        self._waiting = [(x[:, :0], y[:, :0])]

    def read(self, pool: Pool) -> Moments:
        """Return the moments of all rows, of all processes, in float64."""
        self._multiply()
        return self._sums.read(pool)


def solve(moments: Moments, weight: Tensor, ridge: float) -> Tensor | None:
    """Return the weight (G, I, O) of least squares with a ridge towards `weight`; None if the inputs say nothing."""
    scale = moments.xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]  # (G, 1, 1)
    if not bool((scale > 0).all()):
        return None
    penalty = ridge * scale
    matrix = moments.xx + penalty * torch.eye(moments.xx.shape[1], dtype=moments.xx.dtype, device=moments.xx.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        return None
    return torch.cholesky_solve(moments.xy + penalty * weight, factor)


def compare(moments: Moments, weight: Tensor, shift: Tensor | None) -> float:
    """Return the squared error of a weight (G, I, O) and a shift (G, O), over the variance of the outputs.

    Without a shift the mean of the outputs does not matter.
    """
    centered = moments.center()
    spread = centered.yy - 2 * (weight * centered.xy).sum(1) + (weight * (centered.xx @ weight)).sum(1)  # (G, O)
    if shift is not None:
        spread = spread + ((moments.x[:, None] @ weight)[:, 0] + shift - moments.y) ** 2
    return max(0.0, float(spread.sum() / centered.yy.sum().clamp_min(1e-30)))
