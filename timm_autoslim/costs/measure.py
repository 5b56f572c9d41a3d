"""How long a model takes: on a named device, in a named runtime, with a named number of threads."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_autoslim.costs.inputs import place_inputs
from timm_autoslim.costs.runtimes import RUNTIMES
from timm_autoslim.errors import AutoSlimError, LatencyError
from timm_autoslim.utils.arguments import check_dtype, check_integer
from timm_autoslim.utils.copying import copy_deeply


def name_device(device: str | torch.device) -> str:
    """Return what kind of machine a device is: the processor and its instruction set, or the GPU.

    Raises:
        LatencyError: there is no such device here.
    """
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        got = f"{str(device)!r}, which cannot be used here ({str(error).splitlines()[0][:150]})"
        raise LatencyError.at("device", got=got, needed='a device of this machine, such as "cpu" or "cuda:0"') from None
    if place.type == "meta":
        got = "'meta', on which nothing is computed"
        raise LatencyError.at("device", got=got, needed='a device such as "cpu"')
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    if place.type != "cpu":
        return place.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def check_settings(device: str | torch.device, dtype: torch.dtype | None, runtime: str, threads: int) -> None:
    """Raise LatencyError for an unknown device, type or runtime, or a number of threads that is none."""
    choice = RUNTIMES.pick(runtime)
    check_integer("threads", threads, LatencyError)
    check_dtype(dtype, LatencyError)
    name_device(device)
    choice.check(torch.device(device))


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let one operator use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_runs(run: Callable[[], Any], device: torch.device, repeats: int, seconds: float) -> float:
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
    runtime: str = "eager",
    threads: int = 1,
    repeats: int = 10,
) -> float:
    """Return the milliseconds of one forward in eval mode without gradients: the median of several, after a warm-up.

    The model is not touched: a copy of it runs on the device.

    Args:
        model: an ordinary model, such as `supernet.extract(widths)` returns.
        inputs: one batch (N, C, H, W), or a tuple or dict of forward's arguments; the batch size is theirs.
        device: a torch device; onnxruntime runs on "cpu" alone here.
        dtype: type of weights and floating point inputs; None leaves them.
        runtime: a key of `RUNTIMES`: "eager"; "compile", which is torch.compile with its default settings; "cudagraph",
            a CUDA graph, which saves the time of launching kernels; or "onnxruntime", which needs the packages
            onnxruntime and onnxscript.
        threads: threads of the processor for one operator.
        repeats: how many times are measured.

    Raises:
        LatencyError: an unknown device or runtime, a missing package, a model without weights (on the meta device), or
            one that cannot run on these inputs.

    Example:
        >>> milliseconds = measure_latency(nn.Linear(8, 4), torch.zeros(2, 8), repeats=3)
        >>> milliseconds > 0
        True
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
    runtime: str = "eager",
    threads: int = 1,
    rounds: int,
    repeats: int,
) -> list[float]:
    """Return the milliseconds of a forward of each model, measured in turns: a slow minute meets all of them alike.

    Args:
        models: ordinary models; a copy of each is held until all are measured.
        inputs, device, dtype, runtime, threads: as for `measure_latency`.
        rounds: how often each has its turn; the median of its turns counts.
        repeats: how many times are measured in each turn.

    Raises:
        LatencyError: as `measure_latency` does.

    Example:
        >>> wide, narrow = nn.Linear(8, 400), nn.Linear(8, 4)
        >>> milliseconds = measure_in_turns([wide, narrow], torch.zeros(2, 8), rounds=3, repeats=3)
        >>> len(milliseconds)
        2
    """
    turns = measure_turns(
        models, inputs, device=device, dtype=dtype, runtime=runtime, threads=threads, rounds=rounds, repeats=repeats
    )
    return [statistics.median(times) for times in turns]


def measure_turns(
    models: Iterable[nn.Module],
    inputs: Any,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    runtime: str = "eager",
    threads: int = 1,
    rounds: int,
    repeats: int,
) -> list[list[float]]:
    """Return the milliseconds of every turn of each model, as `measure_in_turns` measures them: their spread shows.

    Args:
        models, inputs, device, dtype, runtime, threads, rounds, repeats: as for `measure_in_turns`.

    Returns:
        For every model a list of `rounds` times, in the order of the turns.

    Raises:
        LatencyError: as `measure_in_turns` does.

    Example:
        >>> wide, narrow = nn.Linear(8, 400), nn.Linear(8, 4)
        >>> turns = measure_turns([wide, narrow], torch.zeros(2, 8), rounds=3, repeats=3)
        >>> [len(times) for times in turns]
        [3, 3]
    """
    check_settings(device, dtype, runtime, threads)
    rounds, repeats = check_integer("rounds", rounds, LatencyError), check_integer("repeats", repeats, LatencyError)
    place, start = torch.device(device), RUNTIMES.pick(runtime).start
    inputs = place_inputs(inputs, place, dtype)
    with use_threads(threads), torch.no_grad():
        try:
            runs = [start(_copy(model, place, dtype), inputs, threads) for model in models]
            turns = [[time_runs(run, place, repeats, 0.0) for run in runs] for _ in range(rounds)]
        except AutoSlimError:
            raise
        except Exception as error:  # a model may raise anything on inputs, and a runtime on a model
            raise LatencyError(
                f"the model: cannot run as runtime={runtime!r} ({type(error).__name__}: {str(error)[:200]}); needed: "
                "inputs that fit its forward, and a runtime that knows its operators"
            ) from error
    return [list(times) for times in zip(*turns, strict=True)]


def _copy(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    if not isinstance(model, nn.Module):
        needed = "an nn.Module, as supernet.extract(widths) returns"
        raise LatencyError.at("the model", got=f"a {type(model).__name__}", needed=needed)
    if any(t.is_meta for t in model.state_dict().values()):
        raise LatencyError.at("the model", got="one on the meta device, without weights", needed="a model that can run")
    return copy_deeply(model).eval().to(device, dtype)
