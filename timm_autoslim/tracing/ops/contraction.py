"""Contractions join the labels along the contracted dimension; the outer labels survive, and MACs are counted."""

from __future__ import annotations

import numpy as np

from timm_autoslim.tracing.flow import Flow, follows_dimensions
from timm_autoslim.tracing.labelling import Labels
from timm_autoslim.tracing.labels import Label, Vector
from timm_autoslim.tracing.ops.schema import OperatorCall
from timm_autoslim.tracing.ops.table import RULES
from timm_autoslim.tracing.origins import FromAttribute
from timm_autoslim.tracing.sizes import Size


@RULES.add("mm", "addmm", "bmm", "baddbmm", "mv", "dot")
def _matmul(flow: Flow, op: OperatorCall) -> None:
    out = op.out
    *bias, a, b = op.tensors  # bias broadcasts to out; (N, K), (K, M); (B, N, K), (B, K, M) in bmm; b is (K,) in mv
    la, lb = flow.get_labels(a), flow.get_labels(b)
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
    flow.add_contraction(1, [*zip(out.shape, labels, strict=True), (a.shape[-1], inner)])
    if flow.call.name == "linear":
        flow.add_producer(columns[0] if columns else None)
    elif inner is not None:
        flow.contracted_vectors.setdefault(flow.path, []).append(inner)


@RULES.add("_trilinear")
def _trilinear(flow: Flow, op: OperatorCall) -> None:
    """Label the product of three tensors, of which some dimensions are summed, as in `nn.Bilinear`."""
    shape: list[int] = []
    labels: Labels = []
    tensors = [(op[f"i{i}"], op[f"expand{i}"]) for i in (1, 2, 3)]
    for dim in range(tensors[0][0].dim() + len(tensors[0][1])):
        axes = [dim - sum(e < dim for e in expand) if dim not in expand else None for _, expand in tensors]
        sides = [(t, axis) for (t, _), axis in zip(tensors, axes, strict=True) if axis is not None]
        shape.append(max(t.shape[axis] for t, axis in sides))
        wide = [flow.get_labels(t)[axis] for t, axis in sides if t.shape[axis] > 1]
        label = wide[0] if wide else None
        for other in wide[1:]:
            if label is not None or other is not None:
                label = flow.join(label, other, "a bilinear product")
        labels.append(label)
    flow.set_labels(op.out, [label for dim, label in enumerate(labels) if dim not in op["sumdim"]])
    flow.add_contraction(1, list(zip(shape, labels, strict=True)))
    flow.add_producer(next((v for d, v in enumerate(labels) if d not in op["sumdim"] and d), None))


@RULES.add("_cdist_forward", "_euclidean_dist")
def _distance(flow: Flow, op: OperatorCall) -> None:
    a, b = op.tensors  # (..., N, C), (..., M, C)
    la, lb = flow.get_labels(a), flow.get_labels(b)
    if la[-1] is not None or lb[-1] is not None:
        flow.join(la[-1], lb[-1], "a distance")
    flow.freeze_labels([*la[:-2], *lb[:-2]], "a distance treats this dimension as a batch, not channels")
    flow.set_labels(op.out, [*[None] * (op.out.dim() - 2), la[-2], lb[-2]])
    flow.add_contraction(1, [*zip(op.out.shape, flow.get_labels(op.out), strict=True), (a.shape[-1], la[-1])])


@RULES.add("convolution")
def _convolution(flow: Flow, op: OperatorCall) -> None:
    x, weight, bias = op["input"], op["weight"], op["bias"]  # (N, C, H, W), (O, C / groups, kh, kw), (O,)
    transposed, groups = op["transposed"], op["groups"]  # transposed: the weight is (C, O / groups, kh, kw)
    lx, lw = flow.get_labels(x), flow.get_labels(weight)
    for label in lw[2:]:
        flow.constraints.freeze(label, "the size of a convolution kernel")
    if groups == 1:
        w_in, w_out = (lw[0], lw[1]) if transposed else (lw[1], lw[0])
        if lx[1] is not None or w_in is not None:
            flow.join(lx[1], w_in, "a convolution")
        out_label = w_out
    else:
        out_label = _label_groups(flow, op, lx[1], lw)
    one_point = set(weight.shape[2:]) == {1} and set(op["stride"]) == {1} and not any(op["padding"])
    along = lx[2:] if one_point else _label_along(flow, op, lx[2:])
    flow.set_labels(op.out, [lx[0], out_label, *along])
    if bias is not None and (out_label is not None or flow.get_labels(bias)[0] is not None):
        flow.join(out_label, flow.get_labels(bias)[0], "the bias of a convolution")
    positions = list(zip((x if transposed else op.out).shape, [None, None, *along], strict=True))
    kernel = list(zip(weight.shape, lw[:2] + [None] * (weight.dim() - 2), strict=True))
    flow.add_contraction(1, [positions[0], *positions[2:], *kernel])
    flow.add_producer(out_label)


@RULES.add("torchvision.deform_conv2d")
def _deformable_convolution(flow: Flow, op: OperatorCall) -> None:
    """Label torchvision's deformable convolution; the channels of offsets and masks are coordinates, and stay."""
    x, weight, bias = op["input"], op["weight"], op["bias"]  # (N, C, H, W), (O, C / groups, kh, kw), (O,)
    for tensor in (op["offset"], op["mask"]):
        flow.freeze_labels(flow.get_labels(tensor), "the offsets and masks of a deformable convolution")
    lx, lw = flow.get_labels(x), flow.get_labels(weight)
    flow.freeze_labels([lx[0], *lx[2:], *lw[2:]], "a deformable convolution treats this dimension as positions")
    if op["groups"] == op["offset_groups"] == 1:
        flow.join(lx[1], lw[1], "a deformable convolution")
    else:
        flow.freeze_labels([lx[1], lw[0], lw[1]], "a deformable convolution in groups keeps all channels")
    if lw[0] is not None or flow.get_labels(bias)[0] is not None:
        flow.join(lw[0], flow.get_labels(bias)[0], "the bias of a deformable convolution")
    flow.set_labels(op.out, [None, lw[0], None, None])
    kernel = [(weight.shape[0], lw[0]), (weight.shape[1], lw[1])]
    flow.add_contraction(op.out.shape[0] * op.out.shape[2:].numel() * weight.shape[2:].numel(), kernel)
    flow.add_producer(lw[0])


def _label_along(flow: Flow, op: OperatorCall, labels: Labels) -> Labels:
    """Label what a kernel runs along: channels survive in their order if it gives one for each (as in ECA)."""
    out: Labels = []
    for i, label in enumerate(labels):
        reach = op["dilation"][i] * (op["weight"].shape[2 + i] - 1)
        same_length = op["stride"][i] == 1 and 2 * op["padding"][i] == reach and not op["transposed"]
        if label is not None and same_length:
            flow.constraints.ordered_vectors.append(label)
            out.append(label)
        else:
            flow.freeze_label(label, "a convolution treats this dimension as positions, not channels")
            out.append(None)
    return out


def _label_groups(flow: Flow, op: OperatorCall, lx: Label, lw: Labels) -> Label:
    """Shrink a grouped convolution by whole groups, or by an equal share of each, whichever leaves more steps."""
    x, weight, groups = op["input"], op["weight"], op["groups"]  # (N, C, H, W); (O, C / groups, kh, kw)
    first = lw[0]
    in_each = x.shape[1] // groups
    if lx is None or first is None or (in_each > 1 and lw[1] is None):
        flow.freeze_labels([lx, *lw], "a grouped convolution has input or output channels that cannot shrink")
        return None if first is None or op["transposed"] else first
    out_each = weight.shape[1] if op["transposed"] else weight.shape[0] // groups
    groups_in_code = _find_groups(flow, groups)
    attribute = isinstance(groups_in_code, Size) and isinstance(groups_in_code.origin, FromAttribute)
    by_groups = groups >= min(in_each, out_each) and (attribute or in_each == 1)
    grid = lx.reshape(groups, in_each)
    if op["transposed"]:  # weight (C, O / groups, kh, kw): axis 0 is that of the input, axis 1 repeats for each group
        flow.atoms.join(lx, first)
    if by_groups or follows_dimensions(groups_in_code):
        flow.freeze_label(lw[1], "the channels inside a group stay, because entire groups are removed")
        flow.tie_rows(grid)
        flow.constrain(grid[:, 0], groups_in_code)
        if op["transposed"]:
            return np.repeat(grid[:, 0], out_each)
        rows = first.reshape(groups, out_each)
        flow.tie_rows(rows)
        flow.atoms.join(grid[:, 0], rows[:, 0])
        return first
    if op["transposed"]:
        flow.tie_rows(grid.T)
        return None if lw[1] is None else np.tile(lw[1], groups)
    _tie_shares(flow, grid, first.reshape(groups, out_each), lw[1])
    return first


def _tie_shares(flow: Flow, grid: Vector, rows: Vector, inner: Label) -> None:
    """Take the same channels of each group: of its inputs (groups, C / groups), of its outputs (groups, O / groups)."""
    if inner is not None and flow.would_merge(grid):  # channels were shuffled before it
        flow.atoms.join(flow.tie_by_position(grid), inner)
    elif inner is not None:
        for inputs in grid:
            flow.atoms.join(inputs, inner)
    flow.tie_rows(rows.T)


def _find_groups(flow: Flow, groups: int) -> int:
    """Return the number of groups as the model's code gave it to `conv2d`, `conv_transpose2d` or the like."""
    by_position = next((a for a in flow.call.args[6:9] if isinstance(a, Size)), groups)
    number: int = flow.call.kwargs.get("groups", by_position)
    return number
