"""One process for each model of a sweep, forked so that nothing is imported twice, with limits of memory and time."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Measure = Callable[[str], dict[str, Any]]


def describe_error(error: BaseException) -> str:
    """Return an error as one short text."""
    return f"{type(error).__name__}: {error}"[:400]


def run_children(
    measure: Measure, names: Sequence[str], *, jobs: int, gigabytes: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield what `measure(name)` returns for every name, or its error, `jobs` at a time.

    Args:
        measure: is called in the process of its own.
        names: one for each row.
        jobs: how many processes run at a time.
        gigabytes: address space that each may take beyond what this process has.
        seconds: time for each.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[str, Any, float]] = {}
    waiting = list(reversed(names))
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_measure_and_send, args=(measure, name, gigabytes, sender))
            process.start()
            sender.close()
            running[receiver] = name, process, time.monotonic() + seconds
        soonest = min(end for _, _, end in running.values()) - time.monotonic()
        ready = wait(list(running), timeout=max(0.0, soonest))
        for pipe, (name, process, end) in list(running.items()):
            if pipe not in ready and time.monotonic() < end:
                continue
            try:
                yield pipe.recv() if pipe in ready else {"name": name, "error": f"no result within {seconds:.0f} s"}
            except EOFError:
                process.join()
                yield {"name": name, "error": f"the process ended with status {process.exitcode}"}
            process.kill()
            process.join()
            del running[pipe]


def _measure_and_send(measure: Measure, name: str, gigabytes: int, pipe: Connection) -> None:
    """Measure one model in this process, whose memory is limited, and send the result."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (gigabytes << 30),) * 2)
    try:
        pipe.send(measure(name))
    except Exception as error:  # an error of any kind is a result too
        pipe.send({"name": name, "error": describe_error(error)})
