"""CUDA graphs: models and single operators whose kernels are recorded once, and launched by one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from timm_autoslim.costs.recorder import Operator
from timm_autoslim.errors import LatencyError
from timm_autoslim.utils.meta import run_model
from timm_autoslim.utils.tensors import collect_tensors

COPIES = 20  # of an operator in one graph: launching the graph takes as long as a small kernel
ROUNDS, REPLAYS = 5, 10


def check_cuda_graph(device: torch.device) -> None:
    """Raise LatencyError if the device has no CUDA graphs."""
    if device.type != "cuda":
        remedy = 'or take runtime="eager"'
        raise LatencyError.at("runtime", got=f"'cudagraph' on {str(device)!r}", needed="a CUDA device", remedy=remedy)


def start_cuda_graph(model: nn.Module, inputs: Any, threads: int) -> Callable[[], Any]:
    """Record one forward of a model; return a function that runs it again, and returns the outputs."""
    device = next((tensor.device for tensor in collect_tensors(inputs)), torch.device("cuda"))
    return _record(lambda: run_model(model, inputs), device)


def time_operator(operator: Operator, run: Callable[[], Any], device: torch.device, threads: int) -> float | None:
    """Return the milliseconds of an operator inside a graph, as the mean of several copies of it.

    Returns:
        None for an operator that cannot be recorded.
    """

    def run_copies() -> None:
        for _ in range(COPIES):
            run()

    try:
        replay = _record(run_copies, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it waits for the GPU, for example to learn the shape of its result
        return None
    seconds = []
    for _ in range(1 + ROUNDS):  # the first round warms up
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:]) / (REPLAYS * COPIES)


def _record(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Record the kernels that a function launches; return a function that launches them, and returns its result."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose kernels, and take memory that they keep
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()

    def replay() -> Any:
        graph.replay()
        return outputs

    replay.run = run  # type: ignore[attr-defined]  # the kernels read its weights and inputs
    return replay
