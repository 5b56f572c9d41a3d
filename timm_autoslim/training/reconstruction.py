"""Reconstruction: weights for a slim model, in closed form and without labels, from what the original computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ConfigError, WidthError
from timm_autoslim.slicing.tensors import Axis, take_slice
from timm_autoslim.supernet.convert import convert_by
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.training.examine import Plan, examine, renew_statistics
from timm_autoslim.training.least_squares import (
    Layer,
    compare,
    get_weight,
    have_same_rows,
    set_weight,
    solve,
    sum_moments,
)
from timm_autoslim.training.lockstep import Lockstep
from timm_autoslim.utils.arguments import check_flag, check_integer
from timm_autoslim.utils.bars import show_bar
from timm_autoslim.utils.batches import check_inputs, divide_batch, make_empty_error
from timm_autoslim.utils.copying import copy_deeply
from timm_autoslim.utils.meta import count_images
from timm_autoslim.utils.processes import Pool, check_every_process, choose_pool, copy_from_first, is_first
from timm_autoslim.utils.restoring import restoring_on_error

# What holds weights near those that they had, relative to the mean variance of the inputs; tried for every layer.
RIDGES = (1e-5, 1e-3, 1e-2, 1e-1, 1.0)
# Errors up to this one are of rounding.
EXACT = 1e-6
# Layers that have nothing to do with each other differ by 2 in weights and outputs, those of a model that was trained
# further by less.
_FOREIGN = 0.9


@dataclass(frozen=True)
class LayerReconstruction:
    """What reconstruction did to one layer.

    Attributes:
        name: path of the layer.
        rows: examples that the weights were solved from: images, times positions for a convolution or tokens.
        inputs: numbers that one output is a sum over.
        before, after: error with the sliced and with the new weights, relative to the variance of the original's
            outputs, on images that were not solved with; None if the layer was left.
        reason: why it was left as it was; None if it has new weights.

    Example:
        >>> LayerReconstruction("fc", rows=2000, inputs=256, before=0.53, after=0.31, reason=None).after
        0.31
    """

    name: str
    rows: int
    inputs: int
    before: float | None
    after: float | None
    reason: str | None


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` did, layer by layer in the order of the forward.

    Attributes:
        layers: one for each layer that has weights to solve for.
        images: how many images were used at most; batches, where the model takes one length alone.

    Example:
        >>> layer = LayerReconstruction("fc", rows=2000, inputs=256, before=0.53, after=0.31, reason=None)
        >>> print(Reconstruction((layer,), images=500))
        layer      rows  inputs  before   after
        fc         2000     256   0.530   0.310
    """

    layers: tuple[LayerReconstruction, ...]
    images: int

    def __str__(self) -> str:
        """Return a table with a line for each layer."""
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'rows':>8}  inputs  before   after"]
        for layer in self.layers:
            errors = [" " * 6 if value is None else f"{value:6.3f}" for value in (layer.before, layer.after)]
            text = f"{layer.name:{width}}  {layer.rows:8}  {layer.inputs:6}  {'  '.join(errors)}"
            lines.append(f"{text}  left: {layer.reason}" if layer.reason else text)
        return "\n".join(lines)


@torch.inference_mode(False)
def reconstruct(
    slim: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    *,
    memory_mib: int = 2048,
    distributed: bool = False,
    on_layer: Callable[[LayerReconstruction], None] | None = None,
    progress: bool = True,
) -> Reconstruction:
    """Give a slim model the weights that reproduce the original's outputs, layer by layer. Nothing is trained.

    Layers are taken in the order of the forward. For each, X are its inputs in the slim model as it stands by then, and
    Y the outputs of the original at the channels that are left. Its weights become those that minimize
    `|X W + b - Y|^2 + r d |W - W0|^2`, where W0 are the weights that it had, d is the mean variance of its inputs, and
    r one of `RIDGES`: that with the least error on every fifth image, which is not solved with. BatchNorms get the
    statistics of the slim model as soon as they are reached. Both models run in evaluation mode. (The closed form is
    that of He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168, section 3.1, with
    a ridge towards the weights that are there.)

    A layer keeps its weights if the new ones do not lower its error on these images, or if it has fewer than two rows
    for each input. Solved are linear layers and convolutions of one and two dimensions, grouped ones too; not
    depthwise convolutions, layers that run several times in a forward, weights that other layers share, and those that
    a forward reads without calling the layer, as torch's MultiheadAttention does.

    Args:
        slim: what `supernet.extract(widths)` returned, or such a model after training; changed in place, at the end.
        original: the supernet, or the model that it was made of (with `order=`, `supernet.model`).
        batches: inputs (N, C, H, W) on the models' device, without labels; 500 to 5,000 images are good. Several inputs
            are a tuple or, by name, a dict, as `convert` takes them.
        memory_mib: MiB for activations; where they are large, fewer images are used. The process was seen to grow by
            2.5 times as much: every batch runs in a thread of its own.
        distributed: the processes of torch.distributed work together, each with batches of its own, and end with the
            same weights; every process needs batches. Otherwise each works alone, and should get the same batches.
        on_layer: called after each layer.
        progress: whether to show a progress bar; of several processes that work together only the first one does.

    Raises:
        ConfigError: the slim model does not say its widths, or they are of another model than the original, or its
            channels are in another order; or an argument is out of range.
        DataError: there are no batches, one is none of the model's inputs, or is not finite.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert, reconstruct
        >>> model = timm.create_model("test_vit", num_classes=10).eval()
        >>> images = torch.randn(40, 3, 160, 160)
        >>> supernet = convert(model)
        >>> slim = supernet.extract(supernet.space.uniform(0.5)).eval()
        >>> report = reconstruct(slim, supernet, images.split(10))
        >>> layer = report.layers[1]
        >>> layer.name, layer.after < layer.before
        ('blocks.0.attn.qkv', True)
    """
    check_flag("distributed", distributed)
    check_flag("progress", progress)
    memory = check_integer("memory_mib", memory_mib, ConfigError) * 2**20
    if any(tensor.is_inference() for tensor in slim.state_dict(keep_vars=True).values()):
        got, needed = "tensors that were made in torch.inference_mode()", "a model that can be changed"
        raise ConfigError.at("the slim model", got=got, needed=needed, remedy="extract or load it outside of that mode")
    parts = check_inputs(slim, batches)
    first = next(parts, None)
    pool, device = choose_pool(distributed), next((p.device for p in slim.parameters()), torch.device("cpu"))
    check_every_process(pool, int(first is not None), device)
    if first is None:
        raise make_empty_error()
    spec = _get_spec(slim)
    supernet = original if isinstance(original, Supernet) else convert_by(original, first)
    remaining, divides = _compare_channels(slim, spec, supernet), supernet.takes_any_batch_size
    result = copy_deeply(slim).eval()  # the slim model itself changes at the very end
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        example = next(divide_batch(first, 2)) if divides else first
        plan = examine(result, supernet.model, example, count_images(example) if divides else 1)
        solved = [layer.name for layer in plan.layers if layer.reason is None]
        sizes = [
            size for name, size in zip(plan.stops, plan.sizes, strict=True) if name in solved or name in plan.norms
        ]
        lockstep = Lockstep(
            result, supernet.model, solved, plan.norms, sizes, itertools.chain([first], parts), memory, divides
        )
        reports = []
        shown = progress and (not distributed or is_first())
        with lockstep, show_bar(total=len(solved), desc="reconstruct", unit="layer", shown=shown) as bar:
            for report in _solve_in_turn(lockstep, plan, remaining, pool, device):
                reports.append(report)
                bar.set_postfix_str(report.name)
                bar.update()
                if on_layer is not None:
                    on_layer(report)
        copy_from_first(pool, list(result.state_dict().values()))
        (images,) = pool([torch.tensor(float(lockstep.images), device=device)])
    _set_state(slim, result)
    return Reconstruction(_sort_reports(reports, plan), int(images))


def _sort_reports(reports: Sequence[LayerReconstruction], plan: Plan) -> tuple[LayerReconstruction, ...]:
    """Add the reports of the layers that were not solved for, and put all in the order of the forward."""
    left = [_leave(layer, 0, layer.reason) for layer in plan.layers if layer.reason is not None]
    order = {name: index for index, name in enumerate(plan.stops)}
    return tuple(sorted((*reports, *left), key=lambda report: order[report.name]))


def _solve_in_turn(
    lockstep: Lockstep, plan: Plan, remaining: _Channels, pool: Pool, device: torch.device
) -> Iterator[LayerReconstruction]:
    """Solve for the layers in the order in which they run, and renew the statistics of BatchNorms on the way."""
    layers = {layer.name: layer for layer in plan.layers}
    solved = [name for name, layer in layers.items() if layer.reason is None]
    changed = False  # whether the next layers have other inputs than in the original
    statistics: dict[str, list[Tensor]] = {}  # by BatchNorm
    for name, inputs, targets in lockstep:
        channels = remaining.outputs.get(name)
        if name in plan.norms:
            differs = any(not _are_equal(x, y, channels) for x, y in zip(inputs, targets, strict=True))
            keep = not pool([torch.tensor(float(differs), device=device)])[0]
            statistics[name] = renew_statistics(
                lockstep.list_modules(name), inputs, earlier=statistics.get(name, ()), keep=keep, pool=pool
            )
            changed |= not keep
            continue
        report = _solve(layers[name], inputs, targets, channels, pool)
        if not (changed or name in remaining.narrowed or _follows_narrowed(name, plan.stops, solved, remaining)):
            _check_order(report, remaining)
        changed |= report.before is None or report.before > EXACT
        yield report


def _set_state(slim: nn.Module, result: nn.Module) -> None:
    """Give the slim model all that the result has; whatever interrupts it, it has its own again."""
    before = {name: tensor.detach().clone() for name, tensor in slim.state_dict().items()}
    with restoring_on_error(lambda: slim.load_state_dict(before)):
        slim.load_state_dict(result.state_dict())


def _are_equal(inputs: Tensor, targets: Tensor, channels: Axis) -> bool:
    """Whether what enters a BatchNorm is, but for rounding, what enters those channels of it in the original."""
    targets = take_slice(targets, (None, channels, *(None,) * (targets.dim() - 2)))
    if inputs.shape != targets.shape:
        return False
    difference, size = (inputs - targets).double().norm(), targets.double().norm()
    return bool(difference**2 <= max(EXACT, torch.finfo(inputs.dtype).eps ** 2) * size**2)


def _check_order(report: LayerReconstruction, remaining: _Channels) -> None:
    """Raise ConfigError if a layer has other weights than the original, and does something else altogether.

    Outputs alone do not tell: a layer may read a sum over channels, of which the slim model has fewer.
    """
    if report.name in remaining.foreign and report.before is not None and report.before > _FOREIGN:
        raise ConfigError.at(
            "the original",
            got=f"a model whose layer {report.name} is another one than that of the slim model",
            needed="the model that it was cut from, with its channels in the same order",
            remedy="pass the supernet that it was extracted from: with order=, its model is a reordered copy",
        )


def _follows_narrowed(name: str, stops: Sequence[str], solved: Sequence[str], remaining: _Channels) -> bool:
    """Whether a layer that was narrowed, and that is not solved for, may run before this one."""
    before = set(stops[: stops.index(name)])
    return any(path not in solved and (path in before or path not in stops) for path in remaining.narrowed)


@dataclass(frozen=True)
class _Channels:
    """What the slim model has of the original.

    Attributes:
        outputs: by path, the output channels that are left.
        narrowed: layers with fewer inputs.
        foreign: layers whose weights have little in common with the original's.
    """

    outputs: Mapping[str, Axis]
    narrowed: frozenset[str]
    foreign: frozenset[str]


def _get_spec(slim: nn.Module) -> Spec:
    """Return the spec of a slim model.

    Raises:
        ConfigError: it has none.
    """
    spec = getattr(slim, "autoslim", None)
    if not isinstance(spec, Spec) or not spec.widths:
        got, needed = f"a {type(slim).__name__} that does not say its widths", "what supernet.extract(widths) returned"
        raise ConfigError.at("the slim model", got=got, needed=needed)
    return spec


def _compare_channels(slim: nn.Module, spec: Spec, supernet: Supernet) -> _Channels:
    """Return what the slim model has of the original.

    Raises:
        ConfigError: the slim model is no subnet of the original.
    """
    remedy = "pass the supernet that the slim model was extracted from"
    try:
        slices = supernet.graph.slices(supernet.space.from_dict(dict(spec.widths)).values_)
    except WidthError as error:
        got, needed = f"another model than that of the slim model's widths ({error})", "the model that it was cut from"
        raise ConfigError.at("the original", got=got, needed=needed, remedy=remedy) from None
    tensors = dict(slim.state_dict(keep_vars=True))
    outputs: dict[str, Axis] = {}
    narrowed: set[str] = set()
    foreign: set[str] = set()
    for name, tensor in supernet.model.state_dict(keep_vars=True).items():
        axes = slices.tensors.get(name, (None,) * tensor.dim())
        shape = [
            n if runs is None else sum(length for _, length in runs) for n, runs in zip(tensor.shape, axes, strict=True)
        ]
        if name not in tensors or list(tensors[name].shape) != shape:
            got = f"{name} of the shape {tuple(tensors[name].shape) if name in tensors else 'none'}"
            raise ConfigError.at("the slim model", got=got, needed=f"the shape {tuple(shape)}", remedy=remedy)
        path, _, leaf = name.rpartition(".")
        if leaf in ("weight", "running_mean") and axes and axes[0] is not None:
            outputs[path] = axes[0]
        if leaf == "weight" and any(runs is not None for runs in axes[1:]):
            narrowed.add(path)
        if leaf == "weight" and _are_foreign(tensors[name].detach(), take_slice(tensor.detach(), axes)):
            foreign.add(path)
    return _Channels(outputs, frozenset(narrowed), frozenset(foreign))


def _are_foreign(weight: Tensor, slice_: Tensor) -> bool:
    """Whether a weight has little in common with the slice of the original's."""
    return bool((weight.float() - slice_.to(weight.device).float()).norm() ** 2 > _FOREIGN * slice_.float().norm() ** 2)


def _solve(
    layer: Layer, inputs: list[Tensor], outputs: list[Tensor], channels: Axis, pool: Pool
) -> LayerReconstruction:
    """Solve for the weights of one layer, and set them if they are better."""
    examples = {(x.shape[1:], y.shape[1:]): (x, y) for x, y in zip(inputs, outputs, strict=True)}
    if any(not have_same_rows(layer.module, x, y) for x, y in examples.values()):
        return _leave(layer, 0, "it mixes positions that are narrowed")
    solving, testing = sum_moments(layer, inputs, outputs, channels, pool)
    if solving.count < 2 * layer.inputs or not testing.count:
        return _leave(layer, solving.count, "fewer than two rows for each input")
    module, weight = layer.module, get_weight(layer.module).double()
    has_bias = module.bias is not None
    bias = torch.zeros_like(solving.y) if module.bias is None else module.bias.detach().double().view_as(solving.y)
    moments = solving.center() if layer.centered or has_bias else solving  # is the outputs' mean free?
    before = best = compare(testing, weight, None if layer.centered else bias)
    dtype = layer.module.weight.dtype
    if before <= max(EXACT, torch.finfo(dtype).eps ** 2):
        return LayerReconstruction(layer.name, solving.count, layer.inputs, before, before, "its outputs are right")
    after, better = float("inf"), None
    for ridge in RIDGES:
        solution = solve(moments, weight, ridge)
        if solution is None:
            continue
        solution = solution.to(dtype).double()  # as it will be stored
        shift = solving.y - (solving.x[:, None] @ solution)[:, 0] if has_bias else bias
        error = compare(testing, solution, None if layer.centered else shift)
        after = min(after, error)
        if error < best:
            best, better = error, (solution, shift)
    if after == float("inf"):
        return _leave(layer, solving.count, "its inputs are constant")
    if better is not None:
        set_weight(module, *better)
    reason = None if better else "no lower error"
    return LayerReconstruction(layer.name, solving.count, layer.inputs, before, after, reason)


def _leave(layer: Layer, rows: int, reason: str | None) -> LayerReconstruction:
    return LayerReconstruction(layer.name, rows, layer.inputs, None, None, reason)
