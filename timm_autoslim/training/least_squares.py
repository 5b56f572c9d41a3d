"""Least squares for one layer: its rows of inputs and outputs, their moments, and the weights that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim.utils.moments import Moments, Sums
from timm_autoslim.utils.processes import Pool, pool_alone

# Each layer gets so many rows for each input, but no fewer than this; more change little.
ROWS_PER_INPUT, LEAST_ROWS = 8, 32768
_HELD_OUT = 5  # every fifth image tests


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


def take_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what each output of a layer is a sum over: (G, N, positions, I), for inputs as the layer takes them."""
    inputs = _add_batch(module, inputs)
    if isinstance(module, nn.Linear):
        return inputs.reshape(1, len(inputs), -1, inputs.shape[-1])
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    kernel, stride, padding, dilation = (
        (0 if i == 2 else 1, *value) if isinstance(module, nn.Conv1d) else value
        for i, value in enumerate((module.kernel_size, module.stride, module.padding, module.dilation))
    )
    images = inputs[:, :, None] if isinstance(module, nn.Conv1d) else inputs
    patches = F.unfold(images, kernel, dilation, padding, stride)  # type: ignore[arg-type]  # (N, C k k, positions)
    return torch.unflatten(patches, 1, (module.groups, -1)).permute(1, 0, 3, 2)


def take_outputs(module: nn.Module, outputs: Tensor) -> Tensor:
    """Return the outputs of a layer as (G, N, positions, O), G groups of the layer."""
    outputs = _add_batch(module, outputs)
    if isinstance(module, nn.Linear):
        return outputs.reshape(1, len(outputs), -1, outputs.shape[-1])
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    return torch.unflatten(outputs.flatten(2), 1, (module.groups, -1)).permute(1, 0, 3, 2)


def _add_batch(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return inputs or outputs of a layer with a batch of one image, if they have none."""
    has_batch = tensor.dim() > 1 + len(getattr(module, "kernel_size", ()))
    return tensor if has_batch else tensor[None]


def have_same_rows(module: nn.Module, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether inputs and outputs have the same images and positions: both may be channels of other layers."""
    inputs, outputs = _add_batch(module, inputs), _add_batch(module, outputs)
    return take_rows(module, inputs[:1].float()).shape[2] == take_outputs(module, outputs[:1]).shape[2]


def get_weight(module: nn.Module) -> Tensor:
    """Return the weight of a layer as (G, I, O)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = getattr(module, "groups", 1)
    return weight.detach().reshape(groups, len(weight) // groups, -1).transpose(1, 2)


def set_weight(module: nn.Module, weight: Tensor, shift: Tensor | None) -> None:
    """Set the weight (G, I, O) and, if it has one, the bias (G, O) of a layer."""
    assert isinstance(module.weight, Tensor)
    with torch.no_grad():
        module.weight.copy_(weight.transpose(1, 2).reshape(module.weight.shape))
        if shift is not None and isinstance(module.bias, Tensor):
            module.bias.copy_(shift.reshape(-1))


def sum_moments(
    layer: Layer, inputs: list[Tensor], outputs: list[Tensor], pool: Pool = pool_alone
) -> tuple[Moments, Moments]:
    """Return the moments of four images of five, and those of the fifth.

    Args:
        layer: the layer.
        inputs: by batch, what enters it.
        outputs: by batch, what should come out of it.
        pool: adds up over processes.
    """
    sums: list[Sums] = []
    wanted = max(ROWS_PER_INPUT * layer.inputs, LEAST_ROWS)
    first, count = 0, sum(take_outputs(layer.module, y)[0, :, :, 0].numel() for y in outputs)
    (total,) = pool([torch.tensor(float(count), device=inputs[0].device)])
    generator = torch.Generator().manual_seed(0)
    for x, y in zip(inputs, outputs, strict=True):
        all_rows, all_targets = take_rows(layer.module, x.float()), take_outputs(layer.module, y)
        positions = all_rows.shape[2]
        share = max(1, min(positions, round(positions * wanted / int(total))))
        if share < positions:
            chosen = torch.randperm(positions, generator=generator)[:share].to(x.device)
            all_rows, all_targets = all_rows[:, :, chosen], all_targets[:, :, chosen]
        images = all_rows.shape[1]
        number = torch.arange(first, first + images, device=x.device) % _HELD_OUT
        first += images
        for part, mask in enumerate((number != _HELD_OUT - 1, number == _HELD_OUT - 1)):
            r, t = all_rows[:, mask].flatten(1, 2).float(), all_targets[:, mask].flatten(1, 2).float()
            if not sums:
                sums = [Sums(r.mean(1), t.mean(1)), Sums(r.mean(1), t.mean(1))]
            sums[part].add(r, t)
    solving, testing = (part.read(pool) for part in sums)
    return solving, testing


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
