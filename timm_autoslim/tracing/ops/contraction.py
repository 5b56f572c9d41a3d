"""Contractions join the labels along the contracted dimension; the outer labels survive, and MACs are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from timm_autoslim.tracing.flow import Flow, Labels
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.ops.table import rule
from timm_autoslim.tracing.sizes import FromAttribute, Size


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "dot")
def _matmul(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    *bias, a, b = [t for t in args if isinstance(t, Tensor)]
    la, lb = flow.labels(a), flow.labels(b)
    rows, inner = la[-2:-1], la[-1]
    other = lb[-2] if b.dim() > 1 else lb[-1]
    columns = lb[-1:] if b.dim() > 1 else []
    if inner is not None or other is not None:
        inner = flow.join(inner, other, "a matrix product")
    batch: Labels = []
    if a.dim() == 3:
        batch = [flow.join(la[0], lb[0], "a batched product") if la[0] is not None or lb[0] is not None else None]
    labels = [*batch, *rows, *columns]
    flow.set_labels(out, labels)
    if bias:
        flow.set_labels(out, flow.broadcast([out, bias[0]], out.shape, "a bias"))
    flow.contract(1, [*zip(out.shape, labels, strict=True), (a.shape[-1], inner)])
    if flow.call.name == "linear":
        flow.produce(columns[0] if columns else None)
    elif inner is not None:
        flow.contracted.setdefault(flow.path, []).append(inner)


@rule("convolution")
def _convolution(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    lx, lw = flow.labels(x), flow.labels(weight)
    for label in lw[2:]:
        flow.constraints.freeze(label, "the size of a kernel")
    passes = set(weight.shape[2:]) == {1} and set(args[3]) == {1} and not any(args[4])  # a kernel of one point
    if groups == 1:
        w_in, w_out = (lw[0], lw[1]) if transposed else (lw[1], lw[0])
        if lx[1] is not None or w_in is not None:
            flow.join(lx[1], w_in, "a convolution")
        out_label = w_out
    else:
        out_label = _grouped(flow, x, weight, lx[1], lw, groups, transposed)
    along = lx[2:] if passes else _along(flow, lx[2:], args)
    flow.set_labels(out, [lx[0], out_label, *along])
    if bias is not None and (out_label is not None or flow.labels(bias)[0] is not None):
        flow.join(out_label, flow.labels(bias)[0], "the bias of a convolution")
    positions = list(zip((x if transposed else out).shape, [None, None, *along], strict=True))
    kernel = list(zip(weight.shape, lw[:2] + [None] * (weight.dim() - 2), strict=True))
    flow.contract(1, [positions[0], *positions[2:], *kernel])
    flow.produce(out_label)


def _along(flow: Flow, labels: Labels, args: tuple[Any, ...]) -> Labels:
    """Label what a kernel runs along: channels survive in their order if it gives one for each (as in ECA)."""
    weight, stride, padding, dilation, transposed = args[1], args[3], args[4], args[5], args[6]
    out: Labels = []
    for i, label in enumerate(labels):
        reach = dilation[i] * (weight.shape[2 + i] - 1)
        if label is not None and stride[i] == 1 and 2 * padding[i] == reach and not transposed:
            flow.constraints.ordered.append(label)
            out.append(label)
        else:
            flow.freeze(label, "a convolution runs along it")
            out.append(None)
    return out


def _grouped(flow: Flow, x: Tensor, weight: Tensor, lx: Label, lw: Labels, groups: int, transposed: bool) -> Label:
    """Shrink a grouped convolution by whole groups, or by an equal share of each, whichever leaves more steps."""
    given = flow.call.kwargs.get("groups", next((a for a in flow.call.args[6:9] if isinstance(a, Size)), groups))
    out_each = weight.shape[1] if transposed else weight.shape[0] // groups
    in_each = x.shape[1] // groups
    first = lw[0]
    if lx is None or first is None or (in_each > 1 and lw[1] is None):
        flow.freeze_all([lx, *lw], "a grouped convolution over channels of fixed number")
        return None if first is None or transposed else first
    bound = isinstance(given, Size) and isinstance(given.origin, FromAttribute)
    grid = lx.reshape(groups, in_each)
    if transposed:  # weight (I, O / groups): axis 0 follows the input, axis 1 repeats for each group
        flow.atoms.join(lx, first)
        if groups >= min(in_each, out_each) and (bound or in_each == 1):
            flow.freeze(lw[1], "the channels of one group; whole groups are removed instead")
            tie_rows(flow, grid)
            flow.constrain(grid[:, 0], given)
            return np.repeat(grid[:, 0], out_each)
        tie_rows(flow, grid.T)
        return None if lw[1] is None else np.tile(lw[1], groups)
    rows = first.reshape(groups, out_each)
    if groups >= min(in_each, out_each) and (bound or in_each == 1):
        flow.freeze(lw[1], "the channels of one group; whole groups are removed instead")
        tie_rows(flow, grid)
        tie_rows(flow, rows)
        flow.atoms.join(grid[:, 0], rows[:, 0])
        flow.constrain(grid[:, 0], given)
    else:
        if lw[1] is not None and flow.collapses(grid):  # channels were shuffled before it
            flow.atoms.join(flow.by_position(grid), lw[1])
        elif lw[1] is not None:
            for share in grid:
                flow.atoms.join(share, lw[1])
        for share in rows[1:]:
            flow.atoms.join(rows[0], share)
    return first


def tie_rows(flow: Flow, grid: np.ndarray[Any, Any]) -> None:
    """Tie the channels of each row of the grid: they are removed together."""
    for j in range(1, grid.shape[1]):
        flow.atoms.join(grid[:, 0], grid[:, j])
