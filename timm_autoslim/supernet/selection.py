"""Rank units by how well the outputs of the layers that read them can be computed from those ranked before."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.utils.batches import check_inputs, make_empty_error, run_batch
from timm_autoslim.utils.moments import Moments, Sums
from timm_autoslim.utils.processes import Pool, check_every_process, pool_alone
from timm_autoslim.utils.tensors import collect_tensors

READS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
# Each layer gets so many rows for each input channel, but no fewer than this; more change little.
ROWS_PER_CHANNEL, LEAST_ROWS = 8, 32768
# Layers of more inputs are not recorded: what varies with what would take gigabytes.
MOST_CHANNELS = 8192
# What is left of a channel's variance below this share of the mean is rounding.
FLOOR = 1e-4


def collect_moments(model: nn.Module, batches: Iterable[Any], pool: Pool = pool_alone) -> dict[str, Moments]:
    """Run the model, in evaluation mode, and return what enters its linear layers and convolutions, by path.

    The moments are about the means, of one group of channels and without outputs.

    Convolutions in groups and layers of very many inputs are left out. The model is not changed.

    Args:
        model: the model.
        batches: inputs on the model's device, as `convert` takes them.
        pool: adds up over processes, each of which has batches of its own.

    Raises:
        DataError: there are no batches (of several processes: in one), one is none of the model's inputs, or is not
            finite.
    """
    replica = replicate(model, Slices({}, {})).eval()  # the model itself gets no hooks
    sums: dict[str, Sums] = {}
    count = 0

    def record(path: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows = _take_rows(module, collect_tensors((inputs, named))[0])  # (rows, C)
        share = max(LEAST_ROWS, ROWS_PER_CHANNEL * rows.shape[1]) // max(1, count)
        if len(rows) > max(1, share):
            generator = torch.Generator().manual_seed(0)
            rows = rows[torch.randperm(len(rows), generator=generator)[: max(1, share)].to(rows.device)]
        rows = rows[None]  # (1, rows, C)
        outputs = rows[..., :0]
        if path not in sums:
            sums[path] = Sums(rows.mean(1), outputs.mean(1))
        sums[path].add(rows, outputs)

    for path, module in replica.named_modules():
        inputs = getattr(module, "in_features", getattr(module, "in_channels", 0))
        dense = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1)
        if dense and inputs <= MOST_CHANNELS:
            module.register_forward_pre_hook(functools.partial(record, path), with_kwargs=True)
    parts = list(check_inputs(model, batches))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    check_every_process(pool, len(parts), device)
    if not parts:
        raise make_empty_error()
    count = int(pool([torch.tensor(float(len(parts)), device=device)])[0])
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for index, batch in enumerate(parts):
            run_batch(replica, index, batch)
    return {path: part.read(pool).center() for path, part in sums.items()}


def _take_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the inputs of a layer as (rows, C)."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        inputs = inputs.movedim(-1 - len(module.kernel_size), -1)  # counted from the end: there may be no batch
    return inputs.reshape(-1, inputs.shape[-1]).float()


@dataclass
class _Reader:
    """A layer that reads the units of a strand.

    Attributes:
        unit: (C,), the unit of each channel that it reads.
        left: (C, C), covariance of what the units taken so far leave of the channels.
        outputs: (C, O), covariance of that with the outputs.
        floor: variances below it are rounding.
    """

    unit: Tensor
    left: Tensor
    outputs: Tensor
    floor: Tensor

    def __post_init__(self) -> None:
        members: dict[int, list[int]] = {}
        for channel, unit in enumerate(self.unit.tolist()):
            members.setdefault(unit, []).append(channel)
        # by how many channels a unit has here: the units, and their channels (units, size)
        self.sizes: dict[int, tuple[Tensor, Tensor]] = {}
        for size in {len(channels) for channels in members.values()}:
            units = [unit for unit, channels in members.items() if len(channels) == size]
            rows = [members[unit] for unit in units]
            self.sizes[size] = tuple(torch.tensor(v, device=self.left.device) for v in (units, rows))  # type: ignore[assignment]

    def measure(self, count: int) -> Tensor:
        """Return by unit (count,) what share of the outputs' variance it adds to what is there."""
        result = self.outputs.new_zeros(count)
        for size, (units, channels) in self.sizes.items():
            if size == 1:
                variances = self.left.diagonal()[channels[:, 0]].clamp_min(0) + self.floor
                result[units] = self.outputs[channels[:, 0]].square().sum(1) / variances
                continue
            # several channels of one unit say in part the same
            among = self.left[channels[:, :, None], channels[:, None, :]]
            outputs = self.outputs[channels]  # (units, size, O)
            among = among + self.floor * torch.eye(size, device=among.device)  # (units, size, size)
            solution = torch.linalg.solve(among, outputs)
            result[units] = (outputs * solution).sum((1, 2))
        return result

    def take(self, unit: int) -> None:
        """Leave of all channels what those of this unit do not say."""
        for index in torch.nonzero(self.unit == unit)[:, 0].tolist():
            column = self.left[:, index] / (self.left[index, index].clamp_min(0) + self.floor)
            self.outputs -= column[:, None] * self.outputs[index].clone()
            self.left -= column[:, None] * self.left[index].clone()


class SelectionImportance:
    """Forward selection by least squares: the next unit is the one that explains most of what is not explained yet.

    For every layer that reads the units, with inputs x and weight W, the outputs W x are computed from the channels
    that were selected so far, by least squares. The unit that lowers the error most comes next; errors are relative to
    the variance of the layer's outputs, and added up over the layers. (Choosing channels by the error of the next
    layer's outputs is that of Luo, Wu and Lin, "ThiNet", arXiv 1707.06342, section 3.2, which removes channels one by
    one and solves for weights at the end; selection with the weights solved for at each step is orthogonal least
    squares, Chen, Billings and Luo, 1989.) Of a k x k convolution every tap counts as an output of its own.

    Units that only other layers read, such as queries and keys, are ranked by the magnitude of their weights.
    """

    def __init__(self, moments: dict[str, Moments]) -> None:
        """Take the moments of layers' inputs about their means, by path."""
        self.moments = moments
        self.otherwise = tp.importance.GroupMagnitudeImportance(p=2)

    def __call__(self, group: Any) -> Tensor | None:
        """Return a score for each unit of a `tp.Group`: the number of units for the first, 1 for the last."""
        count = 1 + max(max(item.root_idxs) for item in group)
        device = next((moments.xx.device for moments in self.moments.values()), torch.device("cpu"))
        with torch.autocast(device.type, enabled=False):
            readers: list[_Reader] = []
            for item in group:
                name = item.dep.target.name.partition(" ")[0]
                if item.dep.handler in READS and name in self.moments:
                    readers += self._make_reader(item.dep.target.module, self.moments[name].xx[0], item)
            if readers:
                return self._select(readers, count)
        scores: Tensor | None = self.otherwise(group)
        return scores

    @staticmethod
    def _select(readers: Sequence[_Reader], count: int) -> Tensor:
        """Return the score of each of `count` units: which explains most of what those before it leave."""
        scores = torch.zeros(count)
        waiting = torch.ones(count, dtype=torch.bool)
        for rank in range(count, 0, -1):
            gains = torch.stack([reader.measure(count).cpu() for reader in readers]).sum(0)
            best = int(torch.where(waiting, gains, -1.0).argmax())
            scores[best], waiting[best] = rank, False
            for reader in readers:
                reader.take(best)
        return scores

    def _make_reader(self, module: nn.Module, covariance: Tensor, item: Any) -> list[_Reader]:
        """Return the reader, by the covariance (C, C) of its inputs; none where it puts out nothing that varies."""
        assert isinstance(module.weight, Tensor)
        channels = torch.as_tensor(np.asarray(item.idxs), device=covariance.device)
        left = covariance[channels][:, channels].float()
        weight = module.weight.detach().to(left).transpose(0, 1).flatten(1)[channels]  # (C, outputs of all taps)
        if weight.shape[1] > len(weight):  # as many outputs with the same products
            values, vectors = torch.linalg.eigh(weight @ weight.T)
            weight = vectors * values.clamp_min(0).sqrt()
        outputs = left @ weight
        variance = (weight * outputs).sum()
        if not float(variance) > 0:
            return []
        unit = torch.as_tensor(np.asarray(item.root_idxs), device=left.device)
        floor = FLOOR * left.diagonal().mean()
        return [_Reader(unit, left, outputs / variance.sqrt(), floor)]
