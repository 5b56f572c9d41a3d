"""Trace a model on the meta device into a proven channel graph: the best of the traces that can be made of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from timm_autoslim.errors import NothingToSlimError, TraceError, WidthError
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.outer_state import OuterState, with_empty_caches
from timm_autoslim.tracing.refusals import check_example, check_model
from timm_autoslim.tracing.solve import OUT_OF_STEP, OUTPUT
from timm_autoslim.tracing.strays import check_classes
from timm_autoslim.tracing.tracer import Trace, Tracer
from timm_autoslim.utils.meta import count_images

GOOD_SHARE = 0.35  # of the MACs at half width; the ideal is a quarter


def trace_model(
    model: nn.Module, example: Any, keep_output: bool | Sequence[str] = True, whole_heads: Sequence[str] = ()
) -> Trace:
    """Trace `model` on `example` (a tensor, a tuple or a dict of inputs) into a proven channel graph.

    The model stays as it is: the trace runs a meta copy, and puts back what the model's code keeps outside of it.

    Args:
        model: any model.
        example: inputs of its forward; only shapes and types are read.
        keep_output: freeze the channels of the model's outputs, or of those whose names match one of these globs.
        whole_heads: globs of attention modules that lose whole heads; all others lose channels of every head.

    Raises:
        TraceError: the forward raises on the meta device, or a module cannot be traced.
        NothingToSlimError: no channel can be removed; the text names what is in the way.
        WidthError: a glob of `whole_heads` matches no module that splits channels into heads, or one of `keep_output`
            no output.
    """
    check_model(model)
    check_classes(model)
    check_example(example)
    try:
        find = functools.partial(_find_best, model, example, keep_output, whole_heads, True)
        return with_empty_caches(model, find)
    except TraceError as error:  # its first dimension may be no batch, or a batch that the model fixes
        find = functools.partial(_find_best, model, example, keep_output, whole_heads, False)
        try:
            return with_empty_caches(model, find)
        except TraceError:
            if count_images(example) > 1:  # the example as it is says more
                raise
            raise error from error.__cause__


def _find_best(
    model: nn.Module,
    example: Any,
    keep_output: bool | Sequence[str],
    whole_heads: Sequence[str],
    doubles: bool,
    outer: OuterState,
) -> Trace:
    """Return a trace; where much is fixed, one of equal shares of groups, or of whole heads, if it removes more."""
    tracer = Tracer(model, example, keep_output, whole_heads, doubles)
    best = tracer.run(outer)
    settings: dict[str, Any] = {"whole_heads": whole_heads}
    modules = sorted({path.rpartition(".")[0] for path in best.graph.conflicting_attributes})
    changes: list[dict[str, Any]] = [{"whole_heads": [*whole_heads, *more]} for more in (modules, ["*"]) if more]
    if tracer.flow.has_lost_groups and OUT_OF_STEP in best.graph.fixed.values():
        changes.insert(0, {"equal_shares": True})
    for change in changes:
        share = best.graph.compute_share_at_half()
        if share > GOOD_SHARE:
            with contextlib.suppress(TraceError, WidthError):
                other = Tracer(model, example, keep_output, doubles=doubles, **{**settings, **change}).run(outer)
                is_first = bool(other.graph.group_sizes) and not best.graph.group_sizes
                if is_first or other.graph.compute_share_at_half() < share - 0.01:
                    best, settings = other, {**settings, **change}
    if not best.graph.group_sizes:
        raise _make_obstacle_error(best.graph)
    return best


def _make_obstacle_error(graph: ChannelGraph) -> NothingToSlimError:
    """Return the error for a model of which no channel can be removed; it names what is in the way."""
    reasons = sorted(set(graph.fixed.values()))[:8] or ["it has no weights, and so no channels"]
    only_outputs = OUTPUT in reasons and len(reasons) < 3
    remedy = "; if its outputs are features that may be narrower, convert(model, keep_output=False)"
    return NothingToSlimError(
        f"no channel of the model can be removed; what is in the way: {'; '.join(reasons)}"
        f"{remedy if only_outputs else ''}"
    )
