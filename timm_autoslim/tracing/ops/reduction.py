"""Normalisation, pooling, reductions and running sums."""

from __future__ import annotations

from timm_autoslim.tracing.flow import Flow, follows_dimensions
from timm_autoslim.tracing.ops.elementwise import join_inputs
from timm_autoslim.tracing.ops.schema import OperatorCall, tensors_in_lists
from timm_autoslim.tracing.ops.table import RULES
from timm_autoslim.tracing.sizes import Size


@RULES.add(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_native_batch_norm_legit_functional",
)  # fmt: skip
def _batch_norm(flow: Flow, op: OperatorCall) -> None:
    x, *parameters = op.tensors  # (N, C, ...); weight, bias, running_mean and running_var (C,), as far as there are any
    labels = flow.get_labels(x)
    for parameter in parameters:
        if labels[1] is not None or flow.get_labels(parameter)[0] is not None:
            labels[1] = flow.join(labels[1], flow.get_labels(parameter)[0], "batch norm")
    flow.set_labels(op.out[0], labels)
    for statistic in op.out[1:3]:
        flow.set_labels(statistic, [labels[1]] if statistic.numel() else [None])


@RULES.add("native_layer_norm", "_fused_rms_norm")
def _layer_norm(flow: Flow, op: OperatorCall) -> None:
    x, *parameters = op.tensors  # (..., *normalized_shape); weight and bias of the normalized shape, if there are any
    labels = flow.get_labels(x)
    for parameter in parameters:
        labels = flow.broadcast([x, parameter], x.shape, "layer norm")
    result, *statistics = tensors_in_lists(op.out)
    flow.set_labels(result, labels)
    normalized = len(op["normalized_shape"])
    for statistic in statistics:
        rest = labels[:-normalized] + [None] * normalized
        flow.set_labels(statistic, rest[: statistic.dim()])


@RULES.add("native_group_norm")
def _group_norm(flow: Flow, op: OperatorCall) -> None:
    x, *parameters = op.tensors  # (N, C, ...); weight and bias (C,), if there are any
    groups = op["group"]
    labels = flow.get_labels(x)
    for parameter in parameters:
        labels[1] = flow.join(labels[1], flow.get_labels(parameter)[0], "group norm")
    vector = labels[1]
    if vector is not None and groups > 1:
        grid = vector.reshape(groups, -1)
        groups_in_code = flow.call.find_size(groups)
        by_groups = isinstance(groups_in_code, Size) and groups >= grid.shape[1] and not flow.equal_shares
        flow.has_lost_groups |= by_groups
        if by_groups or follows_dimensions(groups_in_code):
            flow.tie_rows(grid)
            flow.constrain(grid[:, 0], groups_in_code)
        else:
            flow.tie_rows(grid.T)
    flow.set_labels(op.out[0], labels)
    for statistic in op.out[1:]:
        flow.set_labels(statistic, [None] * statistic.dim())


@RULES.add(
    "max_pool2d_with_indices", "avg_pool2d", "avg_pool1d", "max_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
    "_adaptive_avg_pool3d", "avg_pool3d", "max_pool3d_with_indices", "adaptive_avg_pool1d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_nearest1d",
    "_upsample_bilinear2d_aa", "upsample_linear1d", "_upsample_nearest_exact2d", "grid_sampler_2d",
    "_upsample_nearest_exact1d", "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d",
    "grid_sampler_3d", "adaptive_max_pool3d",
)  # fmt: skip
def _spatial(flow: Flow, op: OperatorCall) -> None:
    x = op.tensors[0]  # (N, C, H, W) or (C, H, W); (..., L) in 1d and (..., D, H, W) in 3d
    labels = flow.get_labels(x)
    outer = x.dim() - (1 if "1d" in op.name else 3 if "3d" in op.name else 2)
    for result in tensors_in_lists(op.out):
        flow.set_labels(result, labels[:outer] + [None] * (result.dim() - outer))
    flow.freeze_labels(labels[outer:], "pooling or resizing treats this dimension as positions, not channels")


@RULES.add(
    "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "logsumexp",
    "max", "min", "all", "any", "argmax", "argmin", "prod",
)  # fmt: skip
def _reduce(flow: Flow, op: OperatorCall) -> None:
    if len(op.tensors) > 1:  # the larger or the smaller of two tensors, element by element
        return join_inputs(flow, op)
    x, dims = op["self"], op.get("dim")  # all dimensions if none is given, or if the overload takes none
    dims = [dims] if isinstance(dims, int) else dims or range(x.dim())
    axes = {d % x.dim() for d in dims} if x.dim() else set()
    labels, results = flow.get_labels(x), tensors_in_lists(op.out)
    if op.name in ("argmax", "argmin"):
        flow.freeze_labels([labels[d] for d in axes], "it returns indices of these channels")
    elif op.name in ("max", "min") and len(results) == 2:
        flow.mark_indices(results[1], [labels[d] for d in axes])
    for result in results:
        if result.dim() == x.dim():
            flow.set_labels(result, [None if d in axes else v for d, v in enumerate(labels)])
        else:
            flow.set_labels(result, [v for d, v in enumerate(labels) if d not in axes])
    return None


@RULES.add("cumsum", "cumprod", "logcumsumexp")
def _cumulate(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    flow.freeze_label(labels[op["dim"]], "a running sum depends on the order of these channels")
    flow.set_labels(op.out, labels)
