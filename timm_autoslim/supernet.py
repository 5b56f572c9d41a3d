"""The slimmable supernet: one model, every subnet of it, shared weights."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim import slicing
from timm_autoslim.costs import Conditions
from timm_autoslim.errors import NothingToSlimError, TraceError, WidthError
from timm_autoslim.pieces import Axis
from timm_autoslim.recipe import FORMAT, built_with
from timm_autoslim.space import SearchSpace, Widths, build_space
from timm_autoslim.tape import Tape
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.trace import Trace
from timm_autoslim.tracing.trace import trace as trace_model
from timm_autoslim.tracing.twin import sized, tensors_in

# What timm's models say of themselves, and torchvision's do not.
_TIMM_ONLY = ("feature_info", "num_features", "head_hidden_size")
# Tried in turn where neither the user nor the model says what images it takes.
_USUAL_SIZES = (224, 299, 256, 32)
_CACHED_SLICES = 64


class Supernet(nn.Module):
    """A model whose every forward takes the widths of a subnet; made by `convert`.

    Attributes:
        model: the model itself, whole; its parameters are the shared weights.
        space: the search space.
        graph: the channel-dependency graph.
        conditions: what `peak_bytes` and `latency_ms` are counted for in `cost` and in a search; set it as you like.
    """

    model: nn.Module
    conditions: Conditions

    def __init__(
        self, model: nn.Module, found: Trace, space: SearchSpace, base: str | None, base_args: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.space = space
        self.graph: ChannelGraph = found.graph
        self._trace = found
        self._base, self._base_args = base, dict(base_args)
        self._cache: OrderedDict[tuple[int, ...], slicing.Slices] = OrderedDict()
        self._held: Widths | None = None  # the widths of the `at` block that is open
        self.conditions = Conditions()
        self._tapes: dict[tuple[int, torch.dtype | None], Tape] = {}

    @property
    def repairs(self) -> tuple[str, ...]:
        """What the proof of the trace had to freeze, each with its reason; empty for most models."""
        return tuple(self._trace.repairs)

    @property
    def unruled(self) -> tuple[str, ...]:
        """The operators of the model that have no rule, so that what enters them is fixed."""
        return tuple(sorted(self._trace.unruled))

    def forward(self, *inputs: Any, widths: Widths | None = None, **named: Any) -> Any:
        """Run the subnet of these widths; without widths the widest, or that of an open `at` block.

        Args:
            inputs, named: what the model's own forward takes, such as images (N, C, H, W).
            widths: by name, or after the last input: `supernet(images, widths)`.

        Raises:
            WidthError: the widths are of another model, or differ from those of the open block.
            TraceError: the model uses reentrant gradient checkpointing, which would run the whole model in backward.
        """
        if widths is None and inputs:
            last, further = inputs[-1], len(inputs) > self._trace.positional
            if isinstance(last, Widths) or (last is None and further):  # supernet(images, None) is the widest
                inputs, widths = inputs[:-1], last
        if self._held is not None:
            if widths is not None and widths != self._held:
                raise WidthError(
                    "other widths than those of the open `with supernet.at(...)` block; leave the block first"
                )
            return self.model(*inputs, **named)
        if widths is None:
            return self.model(*inputs, **named)
        with self.at(widths):
            out = self.model(*inputs, **named)
        if widths != self.space.max():
            _refuse_reentrant_checkpoints(out)
        return out

    @contextlib.contextmanager
    def at(self, widths: Widths) -> Iterator[Supernet]:
        """Hold the subnet of these widths for the length of the block, around forward and backward.

        Gradients reach the shared weights. Only at the widest do BatchNorm's running statistics move.

        Raises:
            WidthError: the widths are of another model, or a block is open already.
        """
        self.space.check(widths)
        if self._held is not None:
            raise WidthError("a `with supernet.at(...)` block is open already; leave it first")
        self._held = widths
        try:
            if widths == self.space.max():
                yield self
            else:
                with slicing.applied(self.model, self._slices(widths)):
                    yield self
        finally:
            self._held = None

    def _slices(self, widths: Widths) -> slicing.Slices:
        key = widths.values_
        if key not in self._cache:
            # described attributes too: a forward may read one as a number, and the extracted model has them all
            found = self.graph.slices(key, self._trace.described)
            tensors = {**_statistics(self.model), **found.tensors}
            self._cache[key] = slicing.Slices(tensors, found.attributes)
            if len(self._cache) > _CACHED_SLICES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def tape(self, batch_size: int = 1, dtype: torch.dtype | None = None) -> Tape:
        """Return what one forward in eval mode does, as functions of the widths; made at the first call, then kept.

        Raises:
            TraceError: narrower subnets run other operators than the widest.
            WidthError: an `at` block is open, and the tape is not made yet.
        """
        key = batch_size, dtype
        if key not in self._tapes:
            if self._held is not None:
                raise WidthError("a `with supernet.at(...)` block is open, and its weights are sliced; leave it first")
            found = self._trace
            self._tapes[key] = Tape(self.model, found.example, self.graph, found.described, batch_size, dtype)
        return self._tapes[key]

    def example(self, batch_size: int = 1) -> Any:
        """Return inputs of the shapes that the model was traced with, of this batch size, on the meta device."""
        return sized(self._trace.example, batch_size)

    def extract(self, widths: Widths | None = None) -> nn.Module:
        """Return the subnet as an ordinary model of the same type, with weights of its own.

        `plain.autoslim` is its recipe as plain data: base, arguments, sizes, attributes and widths. A narrower subnet
        has the widest's BatchNorm statistics, which are not its own. `num_batches_tracked` marks them: it is 0 or less
        until `calibrate`, or training for as many batches as leave them a hundredth (44 at a momentum of 0.1), renews
        them, and `export` refuses them until then.

        Raises:
            WidthError: the widths are of another model, or an `at` block is open.
        """
        widths = self.space.check(widths if widths is not None else self.space.max())
        if self._held is not None:
            raise WidthError(
                "a `with supernet.at(...)` block is open, and its weights are sliced; leave it before extract()"
            )
        whole = widths == self.space.max()
        found = self.graph.slices(widths.values_, self._trace.described)
        tensors = {} if whole else {**_statistics(self.model), **found.tensors}
        plain = slicing.extract(self.model, slicing.Slices(tensors, found.attributes))
        if not whole:
            for module in plain.modules():
                tracked = getattr(module, "num_batches_tracked", None)
                if isinstance(tracked, Tensor):
                    tracked.fill_(1 - _batches_to_own(getattr(module, "momentum", None)))
        plain.autoslim = self._recipe(plain, found, widths)  # type: ignore[assignment]
        return plain

    def _recipe(self, plain: nn.Module, found: slicing.Slices, widths: Widths) -> dict[str, Any]:
        before = getattr(self.model, "autoslim", None) or {}  # of a model that was slimmed already
        sizes = dict(before.get("sizes", {}))
        saved = set(self.model.state_dict())  # the rest comes from the base again: it must be known which channels stay
        for name, axes in found.tensors.items():
            if any(axis is not None for axis in axes):
                kept = sizes.get(name, [None] * len(axes))
                sizes[name] = [
                    old if runs is None else sum(n for _, n in runs) if name in saved else slicing.within(runs, old)
                    for old, runs in zip(kept, axes, strict=True)
                ]
        new = {p: list(v) if isinstance(v, tuple) else v for p, v in found.attributes.items()}
        attributes = {**before.get("attributes", {}), **new}
        if (self._base or "").startswith("torchvision/"):  # the loader measures anew what torchvision's models lack
            attributes = {p: v for p, v in attributes.items() if p.partition(".")[0] not in _TIMM_ONLY}
        return {
            "format": FORMAT,
            "base": self._base,
            "base_args": dict(self._base_args),
            "sizes": sizes,
            "attributes": attributes,
            "widths": widths.to_dict(),
        }


def _refuse_reentrant_checkpoints(out: Any) -> None:
    """Raise if backward would run parts of the model again: by then the slices are gone, and nothing would notice."""
    waiting = [t.grad_fn for t in tensors_in(out) if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise TraceError(
                "the model: got reentrant gradient checkpointing, which runs the forward again in backward, without "
                "the slices of this call; needed: `with supernet.at(widths):` around forward and backward"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _statistics(model: nn.Module) -> dict[str, tuple[Axis, ...]]:
    """Name every running statistic, so that a narrower subnet gets copies even of those that are not narrowed."""
    names: dict[str, tuple[Axis, ...]] = {}
    for path, module in model.named_modules():
        for leaf in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = module._buffers.get(leaf)
            if buffer is not None:
                names[f"{path}.{leaf}" if path else leaf] = (None,) * buffer.dim()
    return names


def _batches_to_own(momentum: float | None) -> int:
    """In how many batches of training BatchNorm statistics become a module's own, but for a hundredth."""
    if momentum is None or not 0 < momentum < 1:  # a cumulative average, or none: the first batch replaces what was
        return 1
    return math.ceil(math.log(0.01) / math.log1p(-momentum))


def _example(model: nn.Module) -> list[Any]:
    """Return the inputs to try: what the model's configuration says, or the usual sizes of images."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    shapes = [size] if size else [(3, s, s) for s in _USUAL_SIZES]
    built = _built_size(model)
    if built is not None and shapes[0][1:] != built:  # built with another img_size
        shapes.insert(0, (shapes[0][0], *built))
    stem = _stem_channels(model)
    if stem is not None and stem != shapes[0][0]:  # built with another in_chans
        shapes += [(stem, *shape[1:]) for shape in shapes]
    return [torch.empty((1, *shape), dtype=dtype, device="meta") for shape in shapes]


def _built_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return the image size (H, W) that a module of the model says it was built for, as timm's patch embeddings do."""
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if isinstance(size, tuple) and len(size) == 2 and all(isinstance(n, int) for n in size):
            return size
    return None


def _stem_channels(model: nn.Module) -> int | None:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def _trace(model: nn.Module, example_input: Any, keep_output: bool, whole_heads: Sequence[str]) -> Trace:
    examples = _example(model) if example_input is None else [example_input]
    for i, example in enumerate(examples):
        try:
            return trace_model(model, example, keep_output, whole_heads)
        except TraceError:
            if i == len(examples) - 1:
                raise
    raise AssertionError("unreachable")


def _freeze(found: Trace, globs: Sequence[str]) -> None:
    """Fix the channels of every module that a glob matches."""
    for glob in globs:
        names = [n for n in found.graph.shapes if fnmatch.fnmatchcase(n.rpartition(".")[0], glob)]
        if not names:
            raise WidthError(
                f"freeze={glob!r}: the glob matches no module with weights; globs are matched against module paths"
            )
        found.graph.freeze_tensors(names, f"frozen by the user ({glob})")
    if globs and not found.graph.group_sizes:
        raise NothingToSlimError(f"freeze={list(globs)} leaves no channel that can be removed; freeze fewer modules")


@torch.inference_mode(False)  # inside it, composite operators would reach the tracer whole
def convert(
    model: nn.Module,
    example_input: Any = None,
    order: str | None = None,
    *,
    freeze: str | Sequence[str] = (),
    min: int | float | Mapping[str, int | float] | None = None,
    divisor: int | Mapping[str, int] | None = None,
    choices: Mapping[str, Sequence[int]] | None = None,
    base: str | None = None,
    base_args: Mapping[str, Any] | None = None,
    keep_output: bool | None = None,
    whole_heads: str | Sequence[str] = (),
) -> Supernet:
    """Return the slimmable supernet of any model.

    The supernet wraps `model` and shares its weights, as `DistributedDataParallel` does; converting changes nothing in
    it. With an `order` the supernet wraps a reordered copy instead.

    Args:
        model: a timm or torchvision model, or any `nn.Module`.
        example_input: a tensor (N, C, H, W), or the inputs of the model's forward as a tuple or, by name, as a dict;
            nested ones and members that are no tensors are fine. Only shapes and types are read. The first dimension
            of the first tensor is the batch, whose length is changed; tensors that are as long there follow it. By
            default the shape in the model's `pretrained_cfg`, else the usual sizes of images are tried.
        order: sort the channels of every group by importance, so that the narrow subnets have the best ones: "l1",
            "l2", "bn_scale", "fpgm", "lamp", "taylor" (of the gradients in the model: run the loss backward first) or
            "random" (the same at each call). None leaves them as they stand, and then the widest subnet is
            bit-equal to the model.
        freeze: globs of module paths whose weights must stay whole: what leaves these modules, and what enters them.
        min: the least width of a group: a share of its size (float) or a number (int), for all or by glob.
        divisor: widths that are sampled and searched are multiples of it, for all or by glob.
        choices: the widths that are sampled and searched, by glob.
        base, base_args: the timm name ("resnet18") or "torchvision/NAME", and its arguments, that build the model
            again; an exported model needs them. For a timm model made by its name it is known already, and so are its
            arguments if timm keeps them (1.0.31 does) and JSON can; `base_args` are added to these.
        keep_output: whether the model's outputs keep their channels. By default they do, unless the model has
            `num_classes == 0`: then its outputs are features, and the last stage may shrink as all others.
        whole_heads: globs of attention modules that lose whole heads; all others keep their heads, and each head
            loses channels.

    Raises:
        TraceError: the model's forward cannot be traced.
        NothingToSlimError: no channel can be removed.
        WidthError: a glob matches nothing, a value is out of range, or the order is "taylor" and a weight that it reads
            has no gradient.
    """
    if isinstance(model, Supernet):
        raise TraceError(
            "the model: got a Supernet; needed: the plain model; convert supernet.model, or use the supernet as it is"
        )
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"the model: got a {type(model).__name__}; needed: an nn.Module, such as timm.create_model('resnet18')"
        )
    if keep_output is None:
        keep_output = getattr(model, "num_classes", None) != 0
    heads = [whole_heads] if isinstance(whole_heads, str) else list(whole_heads)
    found = _trace(model, example_input, keep_output, heads)
    _freeze(found, [freeze] if isinstance(freeze, str) else freeze)
    space = build_space(found.graph, min, divisor, choices)
    if order is not None:
        from timm_autoslim.importance import reordered

        model = reordered(model, found.graph, order)
    recipe = getattr(model, "autoslim", None)
    args = built_with(model)
    if base is None and recipe:  # slimmed already: its recipe is taken further
        base, args = recipe["base"], {**recipe["base_args"], **args}
    elif base is None:
        config = getattr(model, "pretrained_cfg", None)
        base = config.get("architecture") if isinstance(config, Mapping) else None
    return Supernet(model, found, space, base, {**args, **(base_args or {})})
