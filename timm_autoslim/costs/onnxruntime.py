"""How long single operators take inside ONNX Runtime, by its own profiler."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timm_autoslim.costs.measure import filled, open_session
from timm_autoslim.costs.tape import ATTENTION, Operator, TensorSpec

OPSET, IR_VERSION = 18, 9  # old enough for every ONNX Runtime of these years
RUNS = 100  # at most, of one operator
SECONDS = 0.02  # of one operator, if it has had MIN_RUNS
MIN_RUNS = 8
WARM_UP = 2


def onnxruntime_ms(operator: Operator, threads: int) -> float | None:
    """Return the milliseconds that ONNX Runtime spends in the kernels of an operator on one batch.

    A graph of this one operator runs under the session's profiler, weights as constants, as in an exported model. Calls
    and changes of the memory layout are left out: inside a network of several convolutions there are hardly any.

    Returns:
        None for an operator that has no counterpart here, or a type that numpy lacks.
    """
    graph = _graph(operator)
    if graph is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(graph.model, threads, Path(folder) / "profile")
        start = time.perf_counter()
        for runs in range(WARM_UP + RUNS):
            session.run(None, graph.feed)
            if runs >= WARM_UP + MIN_RUNS and time.perf_counter() - start > SECONDS:
                break
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["name"].endswith("_kernel_time") and not event["args"]["op_name"].startswith("Reorder"):
            times[event["name"]].append(event["dur"])  # whole microseconds
    # the mean of the lower three quarters: finer than a median of whole numbers, and free of interruptions
    return sum(statistics.fmean(sorted(t[WARM_UP:])[: max(1, len(t) * 3 // 4)]) for t in times.values()) / 1e3


@dataclass(frozen=True)
class _Graph:
    """A serialized ONNX model and its inputs."""

    model: bytes
    feed: dict[str, Any]


def _graph(operator: Operator) -> _Graph | None:
    """Return one operator as ONNX's exporter would write it, with made-up numbers."""
    name, args = operator.name, operator.args
    if name.startswith("aten.convolution"):
        images, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
        how = {"strides": stride, "pads": (*padding, *padding), "dilations": dilation, "group": groups}
        if transposed:
            how["output_padding"] = output_padding
        node = ("ConvTranspose" if transposed else "Conv", ["x", "w", *(["b"] if bias is not None else [])], how)
        return _made([node], {"x": images}, {"w": weight, "b": bias})
    if name.startswith("aten.addmm"):
        return _made([("Gemm", ["x", "w", "b"], {})], {"x": args[1]}, {"w": args[2], "b": args[0]})
    if name.startswith("aten.mm"):
        return _made([("MatMul", ["x", "w"], {})], {"x": args[0]}, {"w": args[1]})
    if name.startswith("aten.bmm"):
        return _made([("MatMul", ["x", "w"], {})], {"x": args[0], "w": args[1]}, {})
    if name == ATTENTION:
        last = len(args[0].shape) - 1
        nodes: list[tuple[str, list[str], dict[str, Any]]] = [
            ("Transpose", ["k"], {"perm": [*range(last - 1), last, last - 1]}),
            ("MatMul", ["q", "0"], {}),
            ("Softmax", ["1"], {"axis": -1}),
            ("MatMul", ["2", "v"], {}),
        ]
        return _made(nodes, dict(zip("qkv", args[:3], strict=True)), {})
    return None


def _made(
    nodes: list[tuple[str, list[str], dict[str, Any]]],
    inputs: dict[str, TensorSpec],
    constants: dict[str, TensorSpec | None],
) -> _Graph | None:
    """Build a graph of nodes, each of which makes the tensor that is named by its number; the last is the output."""
    from onnx import helper, numpy_helper

    given = {name: _array(spec) for name, spec in inputs.items()}
    fixed = {name: _array(spec) for name, spec in constants.items() if spec is not None}
    if any(array is None for array in (*given.values(), *fixed.values())):
        return None
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in given.items()}
    graph = helper.make_graph(
        [helper.make_node(op, names, [str(i)], **how) for i, (op, names, how) in enumerate(nodes)],
        "operator",
        [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in given.items()],
        [helper.make_tensor_value_info(str(len(nodes) - 1), next(iter(kinds.values())), None)],
        [numpy_helper.from_array(a, n) for n, a in fixed.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return _Graph(model.SerializeToString(), given)


def _array(spec: TensorSpec) -> Any:
    """Return made-up numbers, or None where numpy lacks the type."""
    return None if spec.dtype == torch.bfloat16 else filled(spec.shape, spec.dtype, torch.device("cpu")).numpy()
