"""The runtimes in which latency is measured: how each starts a model, where it runs, and how it times operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import _dynamo as dynamo
from torch import nn

from timm_autoslim.costs import cuda_graph, onnxruntime
from timm_autoslim.costs.recorder import Operator
from timm_autoslim.errors import LatencyError
from timm_autoslim.utils.meta import run_model
from timm_autoslim.utils.tables import Table

_MANY = 1 << 30  # more models than anyone compiles


def _allow(device: torch.device) -> None:
    """Refuse no device."""


@dataclass(frozen=True)
class Runtime:
    """How a model runs while its latency is measured.

    Attributes:
        start: gets a model, its inputs and the number of threads, and returns a function that runs the model once.
        check: raises LatencyError if the runtime cannot run on a device.
        time_operator: gets an operator, a function that runs it once in eager mode, the device, and the number of
            threads; returns its milliseconds in the runtime, or None if the runtime has no such operator. Without it,
            operators are timed in eager mode.
        fuses: whether the runtime fuses or removes light operators, so that only heavy ones are timed in it.
        version: the name under which those times are stored.
    """

    start: Callable[[nn.Module, Any, int], Callable[[], Any]]
    check: Callable[[torch.device], None] = _allow
    time_operator: Callable[[Operator, Callable[[], Any], torch.device, int], float | None] | None = None
    fuses: bool = True
    version: Callable[[], str] = str


RUNTIMES: Table[Runtime] = Table("runtime", LatencyError)
"""Runtimes by name; each says how a model runs while its latency is measured."""


def _start_eager(model: nn.Module, inputs: Any, threads: int) -> Callable[[], Any]:
    return lambda: run_model(model, inputs)


def _start_compiled(model: nn.Module, inputs: Any, threads: int) -> Callable[[], Any]:
    compiled: Any = torch.compile(model)
    # subnets share the code of their class, of which torch.compile would run all but the first 8 in eager mode
    with dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
        run_model(compiled, inputs)
    return lambda: run_model(compiled, inputs)


RUNTIMES.add("eager")(Runtime(_start_eager))
RUNTIMES.add("compile")(Runtime(_start_compiled))
RUNTIMES.add("cudagraph")(
    Runtime(
        cuda_graph.start_cuda_graph,
        cuda_graph.check_cuda_graph,
        cuda_graph.time_operator,
        fuses=False,
        version=lambda: "cudagraph",
    )
)
RUNTIMES.add("onnxruntime")(
    Runtime(
        onnxruntime.start_session,
        onnxruntime.check_onnxruntime,
        lambda operator, run, device, threads: onnxruntime.time_operator(operator, threads),
        version=onnxruntime.get_version,
    )
)
