"""How long a model takes: on a named device, in a named runtime, with a named number of threads."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch import _dynamo as dynamo

from timm_autoslim.errors import AutoSlimError, LatencyError
from timm_autoslim.utils.arguments import check_integer
from timm_autoslim.utils.meta import run_model
from timm_autoslim.utils.tensors import collect_tensors

_MANY = 1 << 30  # more models than anyone compiles
Runtime = Literal["eager", "compile", "onnxruntime"]


def device_name(device: str | torch.device) -> str:
    """Return what kind of machine a device is: the processor and its instruction set, or the GPU.

    Raises:
        LatencyError: there is no such device here.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise LatencyError(
            f"got the device {str(device)!r}, which cannot be used here ({str(error).splitlines()[0][:150]}); "
            'needed: a device of this machine, such as "cpu" or "cuda:0"'
        ) from None
    if found.type == "meta":
        raise LatencyError("got the device 'meta', on which nothing is computed; needed: a device such as \"cpu\"")
    if found.type == "cuda":
        return torch.cuda.get_device_name(found)
    if found.type != "cpu":
        return found.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


@contextlib.contextmanager
def running_threads(count: int) -> Iterator[None]:
    """Let one operator use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(run: Callable[[], Any], device: torch.device, repeats: int, seconds: float) -> float:
    """Return the median time of one run, in milliseconds: of `repeats` rounds of as many runs as take `seconds`."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    runs = max(1, min(1000, round(seconds / max(time.perf_counter() - start, 1e-7))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(runs):
            run()
        wait()
        times.append((time.perf_counter() - start) / runs)
    return 1e3 * statistics.median(times)


def measure_latency(
    model: nn.Module,
    inputs: Any,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    runtime: Runtime = "eager",
    threads: int = 1,
    repeats: int = 10,
) -> float:
    """Return the milliseconds of one forward in eval mode without gradients: the median of several, after a warm-up.

    The model is not touched: a copy of it runs on the device.

    Args:
        model: a plain model, such as `supernet.extract(widths)` returns.
        inputs: one batch (N, C, H, W), or a tuple or dict of forward's arguments; the batch size is theirs.
        device: a torch device; onnxruntime runs on "cpu" alone here.
        dtype: type of weights and floating point inputs; None leaves them.
        runtime: "eager"; "compile", which is torch.compile with its default settings; or "onnxruntime", which needs
            the packages onnxruntime and onnxscript.
        threads: threads of the processor for one operator.
        repeats: how many times are measured.

    Raises:
        LatencyError: an unknown device or runtime, a missing package, a model without weights (on the meta device), or
            one that cannot run on these inputs.
    """
    return measure_in_turns(
        [model], inputs, device=device, dtype=dtype, runtime=runtime, threads=threads, rounds=1, repeats=repeats
    )[0]


def measure_in_turns(
    models: Iterable[nn.Module],
    inputs: Any,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    runtime: Runtime = "eager",
    threads: int = 1,
    rounds: int,
    repeats: int,
) -> list[float]:
    """Return the milliseconds of a forward of each model, measured in turns: a slow minute meets all of them alike.

    Args:
        models: plain models; a copy of each is held until all are measured.
        inputs, device, dtype, runtime, threads: as for `measure_latency`.
        rounds: how often each has its turn; the median of its turns counts.
        repeats: how many times are measured in each turn.

    Raises:
        LatencyError: as `measure_latency` does.
    """
    check_conditions(device, dtype, runtime, threads)
    rounds, repeats = check_integer("rounds", rounds, LatencyError), check_integer("repeats", repeats, LatencyError)
    where = torch.device(device)
    given = placed(inputs, where, dtype)
    with running_threads(threads), torch.no_grad():
        try:
            runs = [_runner(_copied(model, where, dtype), given, runtime, threads) for model in models]
            turns = [[timed(run, where, repeats, 0.0) for run in runs] for _ in range(rounds)]
        except AutoSlimError:
            raise
        except Exception as error:  # whatever a model says to inputs, and a runtime to a model
            raise LatencyError(
                f"the model: cannot run as runtime={runtime!r} ({type(error).__name__}: {str(error)[:200]}); needed: "
                "inputs that fit its forward, and a runtime that knows its operators"
            ) from error
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def _copied(model: nn.Module, where: torch.device, dtype: torch.dtype | None) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise LatencyError(
            f"the model: got a {type(model).__name__}; needed: a plain nn.Module, as supernet.extract(widths) returns"
        )
    if any(t.is_meta for t in model.state_dict().values()):
        raise LatencyError("the model has no weights (it is on the meta device); needed: a model that can run")
    return copy.deepcopy(model).eval().to(where, dtype)


def check_conditions(device: str | torch.device, dtype: torch.dtype | None, runtime: str, threads: int) -> None:
    """Raise LatencyError for an unknown device, type or runtime, or a number of threads that is none."""
    if runtime not in get_args(Runtime):
        raise LatencyError(f"got runtime={runtime!r}; needed: one of {list(get_args(Runtime))}")
    check_integer("threads", threads, LatencyError)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LatencyError(f"got dtype={dtype!r}; needed: a floating point type, such as torch.float16, or None")
    device_name(device)
    if runtime == "onnxruntime":
        if torch.device(device).type != "cpu":
            raise LatencyError(f"got runtime='onnxruntime' on {str(device)!r}; needed: the device \"cpu\"")
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise LatencyError(f"runtime='onnxruntime' needs the package {missing[0]}; install timm-autoslim[onnx]")


def _runner(plain: nn.Module, inputs: Any, runtime: Runtime, threads: int) -> Callable[[], Any]:
    if runtime == "onnxruntime":
        return _session(plain, inputs, threads)
    if runtime == "eager":
        return lambda: run_model(plain, inputs)
    compiled: Any = torch.compile(plain)
    # subnets share the code of their class, of which torch.compile would run all but the first 8 in eager mode
    with dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
        run_model(compiled, inputs)
    return lambda: run_model(compiled, inputs)


def _session(plain: nn.Module, inputs: Any, threads: int) -> Callable[[], Any]:
    """Return a run of the exported model in an ONNX Runtime session."""
    named = dict(inputs) if isinstance(inputs, Mapping) else None
    given = () if named else inputs if isinstance(inputs, tuple) else (inputs,)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(plain, given, kwargs=named, dynamo=True, verbose=False)
    assert program is not None
    session = open_session(program.model_proto.SerializeToString(), threads)
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), collect_tensors(inputs), strict=True)}
    return lambda: session.run(None, feed)


def open_session(model: bytes, threads: int, profile: Path | None = None) -> Any:
    """Open a session of ONNX Runtime on the CPU; with `profile`, one that notes its kernels in files of this prefix."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def placed(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return inputs on the device; those that are there without data (meta) are filled."""
    if isinstance(value, Tensor):
        wanted = dtype if value.is_floating_point() else None
        return filled(value.shape, wanted or value.dtype, device) if value.is_meta else value.to(device, wanted)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(placed(v, device, dtype) for v in value)
    if isinstance(value, Mapping):
        return {key: placed(v, device, dtype) for key, v in value.items()}
    return value


def filled(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of ordinary numbers: near 1, so that repeated products become neither denormal nor infinite."""
    if dtype.is_floating_point:
        generator = torch.Generator(device).manual_seed(0)  # of its own: measuring must not move the user's
        return torch.rand(tuple(shape), device=device, generator=generator).add_(0.5).to(dtype)
    return (
        torch.ones(tuple(shape), dtype=dtype, device=device)
        if dtype == torch.bool
        else torch.zeros(tuple(shape), dtype=dtype, device=device)
    )
