"""What reconstruction has to know of two models: their layers in order, which of them can be solved for, and sizes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_autoslim.errors import DataError
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.training.least_squares import Layer, get_weight, take_outputs, take_rows
from timm_autoslim.utils.batches import run_batch
from timm_autoslim.utils.processes import Pool, pool_alone
from timm_autoslim.utils.tensors import collect_tensors

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_ROUNDING = 0.02  # of half precision, with a margin


@dataclass(frozen=True)
class Plan:
    """The way through a slim model.

    Attributes:
        layers: those with weights that inputs are multiplied with.
        norms: paths of BatchNorms with running statistics.
        stops: paths of both, in the order of the forward; that of a BatchNorm once for each time that it runs.
        sizes: by stop, the bytes of one image that go into and out of any module from there on, at most.
    """

    layers: tuple[Layer, ...]
    norms: tuple[str, ...]
    stops: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Call:
    """A call of a module: its first input and its output, and what was in them when the module returned.

    A module that comes after may write into them; the tensors themselves tell what follows what.
    """

    path: str
    inputs: Tensor
    outputs: Tensor
    values: tuple[Tensor, Tensor]
    versions: tuple[int, int]


def examine(slim: nn.Module, original: nn.Module, inputs: Any, images: int) -> Plan:
    """Run both models on a few images, and find out what can be solved for.

    Args:
        slim, original: the models; replicas of them run in evaluation mode.
        inputs: a batch of inputs.
        images: how many images it has.
    """
    calls, original_calls = _record(slim, inputs), _record(original, inputs)
    counts = Counter(call.path for call in calls)
    owners = Counter(id(p) for m in slim.modules() for p in m._parameters.values() if p is not None)
    norms_of = [call for call in calls if isinstance(slim.get_submodule(call.path), _BatchNorm)]
    followed = {(id(call.inputs), call.versions[0]) for call in norms_of}  # and not written into before
    bytes_by_path: Counter[str] = Counter()
    for call in original_calls:
        size = (call.inputs.nbytes + call.outputs.nbytes) // images
        bytes_by_path[call.path] = max(bytes_by_path[call.path], size)
    layers: list[Layer] = []
    norms: list[str] = []
    stops: list[str] = []
    sizes: list[int] = []
    largest = 1
    for call in reversed(calls):  # so that the size of what comes later is known
        module = slim.get_submodule(call.path)
        largest = max(largest, bytes_by_path[call.path])
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            norms.append(call.path)
        elif call.path in stops:
            continue
        elif isinstance(module, _LAYERS):
            reason = _find_reason(module, call, counts[call.path], owners)
            centered = (id(call.outputs), call.versions[1]) in followed
            layers.append(Layer(call.path, module, centered, reason))
        else:
            continue
        stops.append(call.path)
        sizes.append(largest)
    return Plan(
        tuple(reversed(layers)), tuple(dict.fromkeys(reversed(norms))), tuple(reversed(stops)), tuple(reversed(sizes))
    )


def _find_reason(
    module: nn.Linear | nn.Conv1d | nn.Conv2d, call: _Call, count: int, owners: Counter[int]
) -> str | None:
    """Say why the weights of a layer cannot be solved for; None if they can."""
    if "weight" not in module._parameters:
        return "its weight is computed from others"
    if count > 1:
        return "it runs several times in a forward"
    for name in ("weight", "bias"):
        if owners[id(getattr(module, name))] > 1:
            return f"its {name} is shared with another layer"
    if not isinstance(module, nn.Linear):
        if module.groups > 1 and module.in_channels == module.groups:
            return "depthwise"
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return f"its padding ({module.padding if isinstance(module.padding, str) else module.padding_mode})"
    inputs, values = (value.float() for value in call.values)
    outputs = take_outputs(module, values)
    expected = take_rows(module, inputs) @ get_weight(module).float()[:, None]
    if module.bias is not None:
        expected = expected + module.bias.detach().float().reshape(len(expected), 1, 1, -1)
    if expected.shape != outputs.shape or not bool((expected - outputs).norm() <= _ROUNDING * outputs.norm()):
        return "its forward is not that of its type"
    return None


def _record(model: nn.Module, batch: Any) -> list[_Call]:
    """Return the calls of layers, BatchNorms, and other modules without children that take and return a tensor."""
    calls: list[_Call] = []

    def record(path: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        tensors = collect_tensors((inputs, named))
        if tensors and isinstance(output, Tensor):
            values = (tensors[0].clone(), output.clone()) if isinstance(module, _LAYERS) else (tensors[0], output)
            versions = tensors[0]._version, output._version
            calls.append(_Call(path, tensors[0], output, values, versions))

    replica = replicate(model, Slices({}, {})).eval()  # the model itself gets no hooks
    for path, module in replica.named_modules():
        if not len(module._modules) or isinstance(module, (*_LAYERS, _BatchNorm)):  # timm's BatchNormAct2d has children
            module.register_forward_hook(functools.partial(record, path), with_kwargs=True)
    run_batch(replica, 0, batch)
    return calls


def renew_statistics(
    norms: list[nn.Module],
    inputs: list[Tensor],
    *,
    earlier: Sequence[Tensor] = (),
    keep: bool = False,
    pool: Pool = pool_alone,
) -> list[Tensor]:
    """Set the running statistics of a BatchNorm to those of its inputs (N, C, ...), in all batches together.

    With `keep` they stay, and only count as the model's own.

    Args:
        norms: the BatchNorm, as it is in the model and in its runs.
        inputs: by batch.
        earlier: what this function returned when the BatchNorm ran before in the same forward.
        keep: see above.
        pool: adds up over processes.

    Returns:
        The sums that the statistics were computed from, of this process.

    Raises:
        DataError: there is a single value per channel in all.
    """
    moments = [_take_moments(x) for x in inputs]
    sizes = inputs[0].new_tensor([len(inputs), sum(count for count, _, _ in moments)], dtype=torch.float64)
    total = torch.stack([count * mean for count, mean, _ in moments]).sum(0)  # (C,)
    square = torch.stack([count * (mean**2 + variance) for count, mean, variance in moments]).sum(0)
    sums = [sizes, total, square]
    sums = [a + b for a, b in zip(sums, earlier, strict=True)] if earlier else sums
    sizes, total, square = pool(sums)
    batches, count = (int(size) for size in sizes)
    if count < 2 and not keep:
        got = "one image, of which a BatchNorm gets a single value per channel"
        raise DataError.at("batches", got=got, needed="two images or more, better hundreds: one has no variance")
    mean, square = total / count, square / count
    variance = (square - mean**2).clamp_min(0) * (count / max(1, count - 1))
    for norm in norms:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(batches)
        if not keep:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    return sums


def _take_moments(inputs: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return how many values (N, C, ...) has of each channel, their means and their variances (C,) in float64."""
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    dims, count = [0, *range(2, inputs.dim())], inputs.numel() // inputs.shape[1]
    mean = inputs.mean(dims)
    spread = torch.linalg.vector_norm(inputs - mean.view(-1, *(1,) * (inputs.dim() - 2)), dim=dims)
    return count, mean.double(), spread.double() ** 2 / count
