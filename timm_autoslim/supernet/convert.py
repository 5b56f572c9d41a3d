"""convert: any model -> its slimmable supernet."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from timm_autoslim.artifact.spec import derive_spec
from timm_autoslim.errors import NothingToSlimError, TraceError, WidthError
from timm_autoslim.supernet.rules import build_space
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.trace import Trace
from timm_autoslim.tracing.trace import trace as trace_model

# Tried in turn where neither the user nor the model says what images it takes.
_USUAL_SIZES = (224, 299, 256, 32)


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


def _freeze(graph: ChannelGraph, globs: Sequence[str]) -> ChannelGraph:
    """Return a graph in which the channels of every module that a glob matches are fixed."""
    for glob in globs:
        names = [n for n in graph.shapes if fnmatch.fnmatchcase(n.rpartition(".")[0], glob)]
        if not names:
            raise WidthError(
                f"freeze={glob!r}: the glob matches no module with weights; globs are matched against module paths"
            )
        graph = graph.freeze_tensors(names, f"frozen by the user ({glob})")
    if globs and not graph.group_sizes:
        raise NothingToSlimError(f"freeze={list(globs)} leaves no channel that can be removed; freeze fewer modules")
    return graph


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
            "random" (the same at each call). None leaves the order as it is, and then the widest subnet is
            bit-equal to the model.
        freeze: globs of module paths; the channels that enter or leave these modules are fixed.
        min: the least width of a group: a share of its size (float) or a number (int), for all or by glob.
        divisor: widths that are sampled and searched are multiples of it, for all or by glob.
        choices: the widths that are sampled and searched, by glob.
        base, base_args: the timm name ("resnet18") or "torchvision/NAME", and its arguments, that build the model
            again; an exported model needs them. For a timm model made by its name it is known already, and so are its
            arguments if timm keeps them (1.0.31 does) and JSON can; `base_args` are added to these.
        keep_output: whether the channels of the model's outputs are fixed. By default they are, unless the model has
            `num_classes == 0`: then its outputs are features, and the last stage can be narrowed like all others.
        whole_heads: globs of attention modules in which a unit is a head; in all others every head stays, and each head
            is narrowed.

    Raises:
        ArtifactError: `base` or `base_args` cannot be written into the spec of an exported model.
        TraceError: the model's forward cannot be traced.
        NothingToSlimError: no channel can be removed.
        WidthError: a glob matches nothing, a value is out of range, or the order is "taylor" and a weight that it reads
            has no gradient.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert
        >>> model = timm.create_model("resnet10t", num_classes=10)
        >>> supernet = convert(model, torch.zeros(1, 3, 32, 32), order="l1", freeze="conv1.*", min=0.25)
        >>> len(supernet.space)  # without the frozen stem
        7
        >>> supernet.space["layer1.0.conv1"].choices
        (16, 24, 32, 40, 48, 56, 64)
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
    spec = derive_spec(model, base, base_args)
    trace = _trace(model, example_input, keep_output, heads)
    trace = replace(trace, graph=_freeze(trace.graph, [freeze] if isinstance(freeze, str) else freeze))
    space = build_space(trace.graph, min, divisor, choices)
    if order is not None:
        from timm_autoslim.supernet.order import reorder_channels

        model = reorder_channels(model, trace.graph, order)
    return Supernet(model, trace, space, spec)
