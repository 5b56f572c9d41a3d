"""ONNX Runtime: models in a session, and how long single operators take in it, by its profiler."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_autoslim.costs.inputs import make_tensor
from timm_autoslim.costs.recorder import ATTENTION, Operator, TensorSpec
from timm_autoslim.errors import LatencyError
from timm_autoslim.utils.tensors import collect_tensors

OPSET, IR_VERSION = 18, 9  # old enough for every ONNX Runtime of these years
RUNS = 100  # at most, of one operator
SECONDS = 0.02  # of one operator, if it has had MIN_RUNS
MIN_RUNS = 8
WARM_UP = 2


def check_onnxruntime(device: torch.device) -> None:
    """Raise LatencyError if the packages are missing, or the device is not the processor."""
    if device.type != "cpu":
        raise LatencyError.at("runtime", got=f"'onnxruntime' on {str(device)!r}", needed='the device "cpu"')
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        needed = f"the package {missing[0]}"
        raise LatencyError.at("runtime", got="'onnxruntime'", needed=needed, remedy="install timm-autoslim[onnx]")


def get_version() -> str:
    """Return the runtime's name and version."""
    import onnxruntime

    return f"onnxruntime-{onnxruntime.__version__}"


# -- models ---------------------------------------------------------------------------------------------------------


def start_session(model: nn.Module, inputs: Any, threads: int) -> Callable[[], Any]:
    """Export a model, and return a function that runs it once in a session."""
    by_name = dict(inputs) if isinstance(inputs, Mapping) else None
    positional = () if by_name else inputs if isinstance(inputs, tuple) else (inputs,)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(model, positional, kwargs=by_name, dynamo=True, verbose=False)
    assert program is not None
    session = _open_session(program.model_proto.SerializeToString(), threads)
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), collect_tensors(inputs), strict=True)}
    return lambda: session.run(None, feed)


def _open_session(model: bytes, threads: int, profile: Path | None = None) -> Any:
    """Open a session on the processor; with `profile`, one that notes its kernels in files of this prefix."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# -- single operators -----------------------------------------------------------------------------------------------


def time_operator(operator: Operator, threads: int) -> float | None:
    """Return the milliseconds that ONNX Runtime spends in the kernels of an operator on one batch.

    A graph of this one operator runs under the session's profiler, weights as constants, as in an exported model. Calls
    and changes of the memory layout are left out: inside a network of several convolutions there are hardly any.

    Returns:
        None for an operator that has no counterpart here, or a type that numpy lacks.
    """
    graph = make_graph(operator)
    if graph is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        session = _open_session(graph.model, threads, Path(folder) / "profile")
        start = time.perf_counter()
        for runs in range(WARM_UP + RUNS):
            session.run(None, graph.feed)
            if runs >= WARM_UP + MIN_RUNS and time.perf_counter() - start > SECONDS:
                break
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["name"].endswith("_kernel_time") and not event["args"]["op_name"].startswith("Reorder"):
            times[event["name"]].append(event["dur"])  # integers, in microseconds
    # the mean of the lower three quarters: finer than a median of integers, and free of interruptions
    return sum(statistics.fmean(sorted(t[WARM_UP:])[: max(1, len(t) * 3 // 4)]) for t in times.values()) / 1e3


@dataclass(frozen=True)
class Graph:
    """A serialized ONNX model and its inputs."""

    model: bytes
    feed: dict[str, Any]


_Node = tuple[str, list[str], dict[str, Any]]  # operator, inputs, attributes


def make_graph(operator: Operator) -> Graph | None:
    """Return one operator as ONNX's exporter would write it, with made-up numbers; None if it has none."""
    name, args = operator.name, operator.args
    if name.startswith("aten.convolution"):
        images, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
        attributes = {"strides": stride, "pads": (*padding, *padding), "dilations": dilation, "group": groups}
        if transposed:
            attributes["output_padding"] = output_padding
        inputs = ["x", "w", *(["b"] if bias is not None else [])]
        node = ("ConvTranspose" if transposed else "Conv", inputs, attributes)
        return _build([node], {"x": images}, {"w": weight, "b": bias})
    if name.startswith("aten.addmm"):
        return _build([("Gemm", ["x", "w", "b"], {})], {"x": args[1]}, {"w": args[2], "b": args[0]})
    if name.startswith("aten.mm"):
        return _build([("MatMul", ["x", "w"], {})], {"x": args[0]}, {"w": args[1]})
    if name.startswith("aten.bmm"):
        return _build([("MatMul", ["x", "w"], {})], {"x": args[0], "w": args[1]}, {})
    if name == ATTENTION:
        last = len(args[0].shape) - 1
        nodes: list[_Node] = [
            ("Transpose", ["k"], {"perm": [*range(last - 1), last, last - 1]}),
            ("MatMul", ["q", "0"], {}),
            ("Softmax", ["1"], {"axis": -1}),
            ("MatMul", ["2", "v"], {}),
        ]
        return _build(nodes, dict(zip("qkv", args[:3], strict=True)), {})
    return None


def _build(nodes: list[_Node], inputs: dict[str, TensorSpec], constants: dict[str, TensorSpec | None]) -> Graph | None:
    """Build a graph of nodes, each of which makes the tensor that is named by its number; the last is the output."""
    from onnx import helper, numpy_helper

    feed = {name: _make_array(spec) for name, spec in inputs.items()}
    weights = {name: _make_array(spec) for name, spec in constants.items() if spec is not None}
    if any(array is None for array in (*feed.values(), *weights.values())):
        return None
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in feed.items()}
    graph = helper.make_graph(
        [helper.make_node(op, names, [str(i)], **attributes) for i, (op, names, attributes) in enumerate(nodes)],
        "operator",
        [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in feed.items()],
        [helper.make_tensor_value_info(str(len(nodes) - 1), next(iter(kinds.values())), None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return Graph(model.SerializeToString(), feed)


def _make_array(spec: TensorSpec) -> Any:
    """Return made-up numbers, or None where numpy lacks the type."""
    return None if spec.dtype == torch.bfloat16 else make_tensor(spec.shape, spec.dtype, torch.device("cpu")).numpy()
