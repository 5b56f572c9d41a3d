"""Convert a model into its supernet."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from timm_autoslim.artifact.recognition import recognize
from timm_autoslim.artifact.spec import TORCHVISION, derive_spec
from timm_autoslim.errors import NothingToSlimError, TraceError, WidthError
from timm_autoslim.supernet.conflicts import list_conflicts
from timm_autoslim.supernet.rules import FROZEN, build_space
from timm_autoslim.supernet.space import describe_dropped
from timm_autoslim.supernet.supernet import Supernet
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.trace import trace_model
from timm_autoslim.tracing.tracer import Trace
from timm_autoslim.utils.arguments import check_flag, check_texts, check_type
from timm_autoslim.utils.batches import divide_batch
from timm_autoslim.utils.collecting import pause_collection
from timm_autoslim.utils.globs import describe_near, matches

# Tried one after the other if neither the user nor the model gives a size.
_USUAL_SIZES = (224, 299, 256, 32)


def _make_examples(model: nn.Module) -> list[Any]:
    """Return the examples to try: of the size in the model's configuration, or of the usual sizes of images."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    shapes = [size] if size else [(3, s, s) for s in _USUAL_SIZES]
    image_size = _find_image_size(model)
    if image_size is not None and shapes[0][1:] != image_size:  # built with another img_size
        shapes.insert(0, (shapes[0][0], *image_size))
    channels = _find_input_channels(model)
    if channels is not None and channels != shapes[0][0]:  # built with another in_chans
        shapes += [(channels, *shape[1:]) for shape in shapes]
    return [torch.empty((1, *shape), dtype=dtype, device="meta") for shape in shapes]


def _find_image_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return the image size (H, W) that a module holds, as timm's patch embeddings do; None if none does."""
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if isinstance(size, tuple) and len(size) == 2 and all(isinstance(n, int) for n in size):
            return size
    return None


def _find_input_channels(model: nn.Module) -> int | None:
    """Return the input channels of the first convolution, or None."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def _trace_examples(
    model: nn.Module, example_input: Any, keep_output: bool | Sequence[str], whole_heads: Sequence[str]
) -> Trace:
    """Trace the model on the user's example, or on the first example that it takes."""
    examples = _make_examples(model) if example_input is None else [example_input]
    for i, example in enumerate(examples):
        try:
            return trace_model(model, example, keep_output, whole_heads)
        except TraceError:
            if i == len(examples) - 1:
                raise
    raise AssertionError("unreachable")


def _freeze_modules(graph: ChannelGraph, globs: Sequence[str]) -> ChannelGraph:
    """Return a graph in which the channels of every module that a glob matches are fixed."""
    for glob in globs:
        paths = {name: name.rpartition(".")[0] for name in graph.shapes}
        names = [name for name, path in paths.items() if matches(path, glob)]
        if not names:
            got, needed = f"a glob ({glob!r}) that matches no module with weights", "globs of module paths"
            raise WidthError.at(
                "freeze", got=got, needed=needed, remedy=describe_near(glob, filter(None, paths.values()))
            )
        graph = graph.freeze_tensors(names, FROZEN.format(glob))
    if globs and not graph.group_sizes:
        got, needed = f"{list(globs)}, which freezes all channels", "channels that can be removed"
        raise NothingToSlimError.at("freeze", got=got, needed=needed, remedy="freeze fewer modules")
    return graph


@pause_collection()
@torch.inference_mode(False)  # in this mode torch does not decompose operators
def convert(
    model: nn.Module,
    example_input: Any = None,
    order: str | None = None,
    *,
    batches: Iterable[Any] | None = None,
    distributed: bool = False,
    freeze: str | Sequence[str] = (),
    min: int | float | str | Mapping[str, int | float | str] | None = None,
    divisor: int | Mapping[str, int] | None = None,
    choices: Sequence[int | float | str] | Mapping[str, Sequence[int | float | str]] | None = None,
    base: str | None = None,
    base_args: Mapping[str, Any] | None = None,
    keep_output: bool | str | Sequence[str] | None = None,
    whole_heads: str | Sequence[str] = (),
) -> Supernet:
    """Return the slimmable supernet of any model.

    There is a warning of modules that the forward runs though no output depends on them, such as a head whose output a
    wrapper drops.

    The supernet wraps `model` and shares its weights, as `DistributedDataParallel` does. Converting changes nothing in
    the model. With an `order` the supernet wraps a reordered copy instead.

    Args:
        model: a timm or torchvision model, or any `nn.Module`.
        example_input: a tensor (N, C, H, W), or the inputs of the model's forward as a tuple or, by name, as a dict;
            nested ones and members that are no tensors are fine. Only shapes and types are read. The first dimension
            of the first tensor is the batch; the model runs with that length and with twice as much, and so do all
            tensors with the same first length. Where it does not take both (an image without a batch), it runs with
            that length alone. By default the shape in the model's `pretrained_cfg`, else the usual sizes of images
            are tried.
        order: sort the channels of every group by importance, so that the narrow subnets have the best ones: "l1",
            "l2", "bn_scale", "fpgm", "lamp", "taylor" (of the gradients in the model: run the loss backward first),
            "reconstruction" (of `batches`; the best for a trained model that is slimmed without much training) or
            "random" (the same at each call). None leaves the order as it is, and then the widest subnet is bit-equal to
            the model.
        batches: inputs like the example, on the model's device, without labels, for the order "reconstruction"; 500
            images or more are good.
        distributed: the processes of torch.distributed work together, each with batches of its own, and end with the
            same order; every process needs batches. Otherwise each works alone, and should get the same batches.
        freeze: globs of module paths; the channels that enter or leave these modules, or modules in them, are fixed.
        min: the least width of a group: a share of its size (0.25 or "25%") or a number (int), for all or by glob. Like
            that of `freeze`, a glob of a module stands for all modules in it.
        divisor: widths that are sampled and searched are multiples of it, for all or by glob.
        choices: the widths that are sampled and searched, numbers or shares, for all or by glob. They win over `min`
            and `divisor`; of several globs of one argument that match a group the last wins. A rule for some groups of
            another is an exception from it; of all other contradictions there is a warning, which names both.
        base, base_args: the timm name ("resnet18") or "torchvision/NAME", and its arguments, that build the model
            again; an exported model needs them. A timm model that was created by name has its name already, and also
            its arguments if timm keeps them (1.0.31 does) and they are JSON; `base_args` are added to these. For a
            torchvision model the builder that makes the same modules is looked for.
        keep_output: whether the channels of the model's outputs are fixed. By default they are, unless the model has
            `num_classes == 0`: then its outputs are features, and the last stage can be narrowed like all others. Globs
            of the names of outputs ("logits", or ["logits", "pred_boxes"]; of a tuple, "0") keep these alone.
        whole_heads: globs of attention modules, or of modules that hold them, in which a unit is a head; in all others
            every head stays, and each head is narrowed.

    Raises:
        ArtifactError: `base` or `base_args` cannot be written into the spec of an exported model.
        TraceError: the model's forward cannot be traced.
        NothingToSlimError: no channel can be removed.
        WidthError: a glob matches nothing, a value is out of range or of the wrong type, or the order is "taylor" and a
            weight that it reads has no gradient, or "reconstruction" and there are no batches.
        DataError: a batch is none of the model's inputs, or is not finite.

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
        remedy = "convert supernet.model, or use the supernet as it is"
        raise TraceError.at("the model", got="a Supernet", needed="the original model", remedy=remedy)
    if not isinstance(model, nn.Module):
        needed = "an nn.Module, such as timm.create_model('resnet18')"
        raise TraceError.at("the model", got=f"a {type(model).__name__}", needed=needed)
    freeze = check_texts("freeze", freeze, WidthError, "a glob of module paths, or a list of them; () for none")
    whole_heads = check_texts("whole_heads", whole_heads, WidthError, "a glob of attention modules, or a list of them")
    if order is not None:
        check_type("order", order, str, WidthError, "None or the name of a criterion, such as 'l1'")
    if keep_output is None:
        keep_output = getattr(model, "num_classes", None) != 0
    if not isinstance(keep_output, bool):
        keep_output = check_texts("keep_output", keep_output, WidthError, "True, False, or globs of outputs to keep")
    check_flag("distributed", distributed, WidthError)
    if base is None and not hasattr(model, "autoslim") and (match := recognize(model)) is not None:
        base, base_args = f"{TORCHVISION}{match[0]}", {**match[1], **(base_args or {})}
    spec = derive_spec(model, base, base_args)
    trace = _trace_examples(model, example_input, keep_output, whole_heads)
    trace = replace(trace, graph=_freeze_modules(trace.graph, freeze))
    space = build_space(trace.graph, min, divisor, choices)
    for text in (*list_conflicts(space), *filter(None, [describe_dropped(trace.graph)])):
        warnings.warn(text, stacklevel=4)  # beyond the two decorators
    supernet = Supernet(model, trace, space, spec)
    return supernet if order is None else order_supernet(supernet, order, batches, distributed=distributed)


@torch.inference_mode(False)
def order_supernet(
    supernet: Supernet, order: str, batches: Iterable[Any] | None = None, *, distributed: bool = False
) -> Supernet:
    """Return the supernet of a copy of the model, with the channels of every group sorted; as `convert(order=)` does.

    Raises:
        WidthError, DataError: as `convert` does.
    """
    from timm_autoslim.supernet.order import reorder_channels

    model = reorder_channels(supernet.model, supernet.graph, order, batches, distributed=distributed)
    return Supernet(model, supernet._trace, supernet.space, supernet._spec)


def check_rules(
    function: str, rules: Mapping[str, Any], settings: Sequence[str] = (), *, left_out: Sequence[str] = ()
) -> None:
    """Make sure that what a function has got as `**rules` are arguments of `convert` that it hands on.

    Args:
        function: its name.
        rules: what it has got.
        settings: keywords that it has besides.
        left_out: arguments of `convert` that it gives itself; those of the model are never rules.

    Raises:
        TypeError: a rule is none of them.
    """
    names = [name for name in inspect.signature(convert).parameters if name not in ("model", *left_out)]
    for name in rules:
        if name not in names:
            near = difflib.get_close_matches(name, [*names, *settings], n=1)
            hint = f": did you mean {near[0]!r}?" if near else f"; rules are {', '.join(names)}"
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def convert_by(model: nn.Module, batch: Any, **rules: Any) -> Supernet:
    """Convert a model by one image of a batch, or by all of them where it takes this number alone."""
    try:
        return convert(model, next(divide_batch(batch, 1)), **rules)
    except TraceError:
        return convert(model, batch, **rules)
