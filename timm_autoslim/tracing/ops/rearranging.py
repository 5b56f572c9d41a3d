"""Operators that put tensors together, or their elements in other places; the labels move with the elements."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from timm_autoslim.tracing.flow import Flow, follows_dimensions
from timm_autoslim.tracing.labelling import Labels
from timm_autoslim.tracing.labels import Label, Vector
from timm_autoslim.tracing.ops.schema import OperatorCall
from timm_autoslim.tracing.ops.table import RULES
from timm_autoslim.tracing.sizes import Size

# -- put together ---------------------------------------------------------------------------------------------------


@RULES.add("cat")
def _cat(flow: Flow, op: OperatorCall) -> None:
    tensors = [t for t in op["tensors"] if t.numel() or t.dim() > 1]
    dim = op["dim"] % op.out.dim()
    labels: Labels = []
    for d in range(op.out.dim()):
        parts = [flow.get_labels(t)[d] for t in tensors]
        if d == dim:
            labels.append(_concatenate(flow, parts, [t.shape[d] for t in tensors]))
            continue
        label = parts[0]
        for other in parts[1:]:
            if label is not None or other is not None:
                label = flow.join(label, other, "cat")
        labels.append(label)
    flow.set_labels(op.out, labels)


@RULES.add("block_diag")
def _block_diagonal(flow: Flow, op: OperatorCall) -> None:
    """Label the rows and columns of a matrix with others on its diagonal; one without two dimensions is a row."""
    parts = [([None] * 2 + flow.get_labels(t))[-2:] for t in op["tensors"]]
    shapes = [([1] * 2 + list(t.shape))[-2:] for t in op["tensors"]]
    sides = zip(zip(*parts, strict=True), zip(*shapes, strict=True), strict=True)
    flow.set_labels(op.out, [_concatenate(flow, v, n, "block_diag") for v, n in sides])


def _concatenate(flow: Flow, parts: Sequence[Label], lengths: Sequence[int], what: str = "cat") -> Label:
    if all(part is None for part in parts):
        return None
    vectors = []
    for part, length in zip(parts, lengths, strict=True):
        if part is None:
            part = flow.atoms.create(length)
            flow.freeze_label(part, f"{what} includes a part that cannot shrink")
        vectors.append(part)
    return np.concatenate(vectors)


@RULES.add("stack")
def _stack(flow: Flow, op: OperatorCall) -> None:
    tensors, dim = op["tensors"], op["dim"] % op.out.dim()
    labels = flow.broadcast(tensors, tensors[0].shape, "stack")
    flow.set_labels(op.out, [*labels[:dim], None, *labels[dim:]])


@RULES.add("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
           "replication_pad2d", "replication_pad3d")  # fmt: skip
def _pad(flow: Flow, op: OperatorCall) -> None:
    pads = op.get("pad", op.get("padding"))  # before and after the last dimension, then the one before that, ...
    pads_in_code = flow.call.find_sizes(pads) or pads
    labels = flow.get_labels(op["self"])
    for i in range(0, len(pads), 2):
        d = op.out.dim() - 1 - i // 2
        label = labels[d]
        if label is None or not (pads[i] or pads[i + 1]):
            continue
        if pads[i] < 0 or pads[i + 1] < 0:
            flow.freeze_label(label, "pad crops these channels")
            labels[d] = None
            continue
        before, after = (_label_edge(flow, op, pads_in_code[j]) for j in (i, i + 1))
        labels[d] = np.concatenate([before, label, after])
    flow.set_labels(op.out, labels)


def _label_edge(flow: Flow, op: OperatorCall, size: int) -> Vector:
    """Label the channels of a constant that pad adds; `size` is their number as the model's code passed it."""
    edge = flow.atoms.create(int(size))
    if isinstance(size, Size) and len(edge) and op.name == "constant_pad_nd":
        flow.constrain(edge, size)
    else:
        flow.freeze_label(edge, "pad adds these channels")
    return edge


@RULES.add("repeat", "tile")
def _repeat(flow: Flow, op: OperatorCall) -> None:
    x, out, times = op["self"], op.out, op.get("repeats", op.get("dims"))  # `dims` is tile's word
    labels = [None] * (out.dim() - x.dim()) + flow.get_labels(x)
    lengths = [1] * (out.dim() - x.dim()) + list(x.shape)
    times_in_code = flow.call.find_sizes(times) or times
    for d, (label, length) in enumerate(zip(labels, lengths, strict=True)):
        if label is not None:
            labels[d] = np.tile(label, times[d])
        elif length == 1 and times[d] > 1:
            labels[d] = flow.label_new_dimension(times[d], times_in_code[d])
    flow.set_labels(out, labels)


# -- put in other places --------------------------------------------------------------------------------------------


@RULES.add("flip")
def _flip(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    for d in op["dims"]:
        label = labels[d]
        labels[d] = None if label is None else label[::-1]
    flow.set_labels(op.out, labels)


@RULES.add("roll")
def _roll(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    for shift, d in zip(op["shifts"], op["dims"] or (), strict=False):
        label, shift_in_code = labels[d], flow.call.find_size(shift)
        if label is not None and follows_dimensions(shift_in_code) and 0 < shift < len(label):
            flow.constrain(label[-shift:], shift_in_code)
            labels[d] = np.roll(label, shift)
        else:
            flow.freeze_label(label, "roll moves channels by a fixed distance")
    for label in labels if not op["dims"] else ():
        flow.freeze_label(label, "roll moves channels by a fixed distance")
    flow.set_labels(op.out, labels)


@RULES.add("tril", "triu")
def _triangle(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])  # (..., rows, columns)
    *_, rows, columns = labels
    is_at_diagonal = op["diagonal"] in ((0, -1) if op.name == "tril" else (0, 1))
    if rows is not None and columns is not None and len(rows) == len(columns) and is_at_diagonal:
        flow.atoms.join(rows, columns)  # with the same rows and columns, in their order, a part is a triangle too
        flow.constraints.ordered_vectors += [rows, columns]
    else:
        flow.freeze_labels([rows, columns], f"{op.name} depends on the place of these channels")
    flow.set_labels(op.out, labels)


@RULES.add("im2col")
def _im2col(flow: Flow, op: OperatorCall) -> None:
    batch, channels, *along = flow.get_labels(op["self"])  # (N, C, H, W) to (N, C * kh * kw, windows)
    flow.freeze_labels(along, "unfold treats this dimension as positions, not channels")
    blocks = None if channels is None else np.repeat(channels, prod(op["kernel_size"]))
    flow.set_labels(op.out, [batch, blocks, None])


@RULES.add("col2im")
def _col2im(flow: Flow, op: OperatorCall) -> None:
    batch, blocks, windows = flow.get_labels(op["self"])  # (N, C * kh * kw, windows) to (N, C, H, W)
    flow.freeze_label(windows, "fold treats this dimension as positions, not channels")
    channels = None
    if blocks is not None:
        grid = blocks.reshape(-1, prod(op["kernel_size"]))
        flow.tie_rows(grid)  # the points of one channel's window go together
        channels = grid[:, 0]
    flow.set_labels(op.out, [batch, channels, None, None])


@RULES.add("pixel_shuffle")
def _pixel_shuffle(flow: Flow, op: OperatorCall) -> None:
    batch, blocks, *along = flow.get_labels(op["self"])  # (N, C * factor**2, H, W) to (N, C, H * factor, W * factor)
    flow.freeze_labels(along, "a pixel shuffle treats this dimension as positions, not channels")
    channels = None
    if blocks is not None:
        grid = blocks.reshape(-1, op["upscale_factor"] ** 2)
        flow.tie_rows(grid)  # the points of one channel's block go together
        channels = grid[:, 0]
    flow.set_labels(op.out, [batch, channels, *[None] * len(along)])


@RULES.add("pixel_unshuffle")
def _pixel_unshuffle(flow: Flow, op: OperatorCall) -> None:
    batch, channels, *along = flow.get_labels(op["self"])  # (N, C, H * factor, W * factor) to (N, C * factor**2, H, W)
    flow.freeze_labels(along, "a pixel shuffle treats this dimension as positions, not channels")
    blocks = None if channels is None else np.repeat(channels, op["downscale_factor"] ** 2)
    flow.set_labels(op.out, [batch, blocks, *[None] * len(along)])


@RULES.add("channel_shuffle")
def _channel_shuffle(flow: Flow, op: OperatorCall) -> None:
    batch, label, *along = flow.get_labels(op["self"])  # (N, C, ...): C as (groups, each) is read by the columns
    flow.freeze_labels(along, "a channel shuffle treats this dimension as positions, not channels")
    if label is not None:
        groups = op["groups"]
        each, groups_in_code = len(label) // groups, flow.call.find_size(groups)
        rows, columns = flow.split(label, [groups, each], [groups_in_code, -1])
        flow.constrain(rows, groups_in_code)
        by_row = None if rows is None else np.tile(rows, each)
        label = by_row if columns is None else np.repeat(columns, groups)
    flow.set_labels(op.out, [batch, label, *[None] * len(along)])
