"""Normalisation, pooling and reductions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops.contraction import tie_rows
from timm_autoslim.tracing.ops.elementwise import pointwise
from timm_autoslim.tracing.ops.table import rule, tensors_in
from timm_autoslim.tracing.sizes import Size


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_native_batch_norm_legit_functional")  # fmt: skip
def _batch_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    for parameter in (p for p in args[1:5] if isinstance(p, Tensor)):
        if labels[1] is not None or flow.labels(parameter)[0] is not None:
            labels[1] = flow.join(labels[1], flow.labels(parameter)[0], "batch norm")
    flow.set_labels(out[0], labels)
    for statistic in out[1:3]:
        flow.set_labels(statistic, [labels[1]] if statistic.numel() else [None])


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, shape, *affine = args[:4]
    labels = flow.labels(x)
    for parameter in (p for p in affine if isinstance(p, Tensor)):
        labels = flow.broadcast([x, parameter], x.shape, "layer norm")
    results = tensors_in(out)
    flow.set_labels(results[0], labels)
    for statistic in results[1:]:
        keep = labels[: -len(shape)] + [None] * len(shape)
        flow.set_labels(statistic, keep[: statistic.dim()])


@rule("native_group_norm")
def _group_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, groups = args[0], args[6]
    labels = flow.labels(x)
    for parameter in (p for p in args[1:3] if isinstance(p, Tensor)):
        labels[1] = flow.join(labels[1], flow.labels(parameter)[0], "group norm")
    vector = labels[1]
    if vector is not None and groups > 1:
        grid = vector.reshape(groups, -1)
        given = flow.written_one(groups)
        if isinstance(given, Size) and groups >= grid.shape[1]:
            tie_rows(flow, grid)
            flow.constrain(grid[:, 0], given)
        else:
            for share in grid[1:]:
                flow.atoms.join(grid[0], share)
    flow.set_labels(out[0], labels)
    for statistic in out[1:]:
        flow.set_labels(statistic, [None] * statistic.dim())


@rule(
    "max_pool2d_with_indices", "avg_pool2d", "avg_pool1d", "max_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
    "_adaptive_avg_pool3d", "avg_pool3d", "max_pool3d_with_indices", "adaptive_avg_pool1d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_nearest1d",
    "_upsample_bilinear2d_aa", "upsample_linear1d", "_upsample_nearest_exact2d", "grid_sampler_2d",
)  # fmt: skip
def _spatial(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = flow.labels(args[0])
    keep = args[0].dim() - (1 if "1d" in flow.operator else 3 if "3d" in flow.operator else 2)
    for result in tensors_in(out):
        flow.set_labels(result, labels[:keep] + [None] * (result.dim() - keep))
    flow.freeze_all(labels[keep:], "pooling or resizing runs along it")


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "logsumexp",
      "max", "min", "all", "any", "argmax", "argmin", "prod")  # fmt: skip
def _reduce(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    x, results = args[0], tensors_in(out)
    if len([a for a in args if isinstance(a, Tensor)]) > 1:
        return pointwise(flow, args, kwargs, out)
    position = 2 if flow.operator in ("linalg_vector_norm", "norm") else 1
    dims = args[position] if len(args) > position else kwargs.get("dim")
    if dims is None or dims == []:
        dims = range(x.dim())
    elif isinstance(dims, int):
        dims = [dims]
    gone = {d % x.dim() for d in dims} if x.dim() else set()
    labels = flow.labels(x)
    if flow.operator in ("argmax", "argmin"):
        flow.freeze_all([labels[d] for d in gone], "an index of channels leaves it")
    elif flow.operator in ("max", "min") and len(results) == 2:
        flow.index(results[1], [labels[d] for d in gone])
    for result in results:
        if result.dim() == x.dim():
            flow.set_labels(result, [None if d in gone else v for d, v in enumerate(labels)])
        else:
            flow.set_labels(result, [v for d, v in enumerate(labels) if d not in gone])
    return None
