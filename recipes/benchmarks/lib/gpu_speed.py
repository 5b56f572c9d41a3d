"""On a GPU: the time of a training step, and memory and latency beside what CUDA itself says."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from timm_autoslim import RUNTIMES, SAMPLERS, LatencyTable, cost, measure_latency, sandwich_step
from timm_autoslim.recipes.benchmarks.speed import Bench, measure_half, measure_step, summarize

Row = dict[str, Any]

MODELS = ("resnet50", "mobilenetv2_100", "convnext_tiny", "vit_small_patch16_224")
IN_ROW = 3  # calls without a wait for the GPU, as in a training
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def list_models(args: argparse.Namespace) -> list[str]:
    """Return the names of the timm models that are timed."""
    return ["resnet10t"] if args.toy else list(MODELS)


def make_bench(name: str, args: argparse.Namespace, *, amp: bool) -> Bench:
    """Set up one model, in bfloat16 with channels last or in float32."""
    return Bench({"model": name, "batch": 2, "size": 32 if args.toy else 224, "device": args.device, "amp": amp,
                  "threads": torch.get_num_threads(), "channels_last": amp})  # fmt: skip


def measure_speed(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Time the half-wide subnet and the sandwich step, and count their kernels."""
    bench = make_bench(name, args, amp=True)
    for batch in (2, 4) if args.toy else (32, 256):
        bench.inputs, bench.targets = bench.draw_batch(batch)
        common = {"question": "speed", "batch": batch, "size": bench.size, "torch": torch.__version__}
        half, step = measure_half(bench, 3 if args.toy else 9), measure_step(bench, 2)
        in_row = {"half": measure_half(bench, 3, IN_ROW), "step": measure_step(bench, 2, IN_ROW)}
        timed = {"half": half, "step": step, "in_row": in_row, "new_widths": time_new_widths(bench)}
        yield common | timed | profile_half(bench)


def time_new_widths(bench: Bench) -> Row:
    """Time a sandwich step with widths that no step had before, and the same step again."""
    seconds = []
    for _ in range(2):
        bench.wait()
        start = time.perf_counter()
        bench.run_sandwich(12345)
        bench.wait()
        seconds.append(time.perf_counter() - start)
    return {"first_ms": seconds[0] * 1e3, "again_ms": seconds[1] * 1e3}


def list_samplers(args: argparse.Namespace) -> list[str]:
    """Return the samplers whose cost of new widths is measured."""
    return ["independent", "coarse"]


def measure_new_widths(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Train for some steps with random widths: what is new to cuDNN is planned before it runs."""
    model, batch = ("resnet10t", 4) if args.toy else ("resnet18", 64)
    bench = Bench({"model": model, "batch": batch, "size": 64, "device": args.device, "amp": True,
                   "threads": torch.get_num_threads(), "channels_last": True})  # fmt: skip
    space, generator = bench.supernet.space, torch.Generator().manual_seed(0)
    seconds: list[float] = []
    for _ in range(4 if args.toy else 20 if name == "independent" else 100):
        bench.wait()
        start = time.perf_counter()
        sandwich_step(
            bench,
            space,
            bench.inputs,
            bench.targets,
            F.cross_entropy,
            generator=generator,
            sample=lambda g: SAMPLERS[name](space, g),
        )
        bench.wait()
        seconds.append(time.perf_counter() - start)
    yield {"question": "widths", "model": model, "batch": batch, "steps": len(seconds), "seconds": sum(seconds),
           "first_ms": 1e3 * statistics.median(seconds[1:6]),
           "last_ms": 1e3 * statistics.median(seconds[-10:])}  # fmt: skip


def make_widths_table(rows: list[Row]) -> str:
    """Return the table of samplers; empty if there are no rows."""
    rows = [row for row in rows if row.get("question") == "widths"]
    lines = [
        "| GPU | model, batch | sampler | steps | a step at first, ms | a step at the end, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['device']} | {row['model']}, {row['batch']} | {row['case']} | {row['steps']} "
            f"| {row['first_ms']:.0f} | {row['last_ms']:.0f} |"
        )
    return "\n".join(lines) if rows else ""


def profile_half(bench: Bench) -> Row:
    """Count what the half-wide subnet launches in one forward and backward, and what its extracted model does."""
    widths = bench.supernet.space.uniform(0.5)
    extracted = bench.supernet.extract(widths).train()
    replica_ms = time_host(lambda: bench.supernet.subnet(widths))
    host = {
        "ours": time_host(lambda: bench.learn(bench.supernet, widths)),
        "theirs": time_host(lambda: bench.learn(extracted)),
    }
    ours = count_kernels(lambda: bench.learn(bench.supernet, widths))
    theirs = count_kernels(lambda: bench.learn(extracted))
    more = {
        kernel: [ours["by_name"][kernel][i] - theirs["by_name"].get(kernel, [0, 0])[i] for i in range(2)]
        for kernel in ours["by_name"]
    }
    largest = dict(sorted(more.items(), key=lambda item: -abs(item[1][1]))[:12])
    profiles = {
        name: {k: v for k, v in p.items() if k != "by_name"} for name, p in (("ours", ours), ("theirs", theirs))
    }
    return {"replica_ms": replica_ms, "host_ms": host, "profile": profiles, "more": largest}


def time_host(run: Callable[[], Any], repeats: int = 10) -> float:
    """Return the milliseconds that the host is busy with a call, without waiting for the GPU: the median."""
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def count_kernels(run: Callable[[], Any]) -> Row:
    """Return how many kernels a call launches, their milliseconds, and how often the host waits for the GPU."""
    run()
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if torch.cuda.is_available() else None
    ) as trace:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    waits = 0
    for event in trace.events() or ():
        if event.device_type == DeviceType.CUDA:
            counts[event.name[:100]] += 1
            times[event.name[:100]] += event.time_range.elapsed_us()
        elif event.name in WAITS:
            waits += 1
    by_name = {name: [count, round(times[name])] for name, count in counts.items()}
    return {"kernels": counts.total(), "kernels_ms": times.total() / 1e3, "waits": waits, "by_name": by_name}


def make_speed_table(rows: list[Row]) -> str:
    """Return the table of step times; empty if there are no rows."""
    rows = [row for row in rows if row.get("question") == "speed"]
    if not rows:
        return ""
    lines = [
        "| GPU | model | batch | half-wide subnet over its extracted model | sandwich step over its four "
        "| both, three in a row | the step with new widths, first time, ms | kernels | milliseconds of kernels "
        "| host, ms | making the subnet, ms | waits |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        half, step, ours, theirs = row["half"], row["step"], row["profile"]["ours"], row["profile"]["theirs"]
        cells = [
            row["device"], row["case"], str(row["batch"]),
            _show(*(half[f"added_{key}"] for key in ("ratio", "low", "high", "ours", "theirs"))),
            _show(*(step[key] for key in ("ratio", "low", "high", "ours", "theirs"))),
            _show_in_row(row),
            f"{row['new_widths']['first_ms']:.0f}", f"{ours['kernels']} / {theirs['kernels']}",
            f"{ours['kernels_ms']:.2f} / {theirs['kernels_ms']:.2f}",
            f"{row['host_ms']['ours']:.1f} / {row['host_ms']['theirs']:.1f}", f"{row['replica_ms']:.1f}",
            f"{ours['waits'] - 1} / {theirs['waits'] - 1}",  # one is the benchmark's own
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _show_in_row(row: Row) -> str:
    if "in_row" not in row:
        return ""
    half, step = row["in_row"]["half"], row["in_row"]["step"]
    return f"{half['added_ratio']:.2f}, {step['ratio']:.2f}"


def _show(ratio: float, low: float, high: float, ours: float, theirs: float) -> str:
    return f"{ratio:.2f} ({low:.2f} to {high:.2f}; {ours:.1f} / {theirs:.1f} ms)"


def list_compiled(args: argparse.Namespace) -> list[str]:
    """Return the models that are compiled, with the batch."""
    return ["resnet10t 2"] if args.toy else ["resnet50 32", "vit_small_patch16_224 32", "resnet50 256"]


def measure_compiled(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Time forward and backward of the subnets that every step has, as they are and by `torch.compile`.

    That is the most that compiling them can bring to a step: the two others have new widths in every step.
    """
    model, batch = name.split()
    bench = make_bench(model, args, amp=True)
    bench.inputs, bench.targets = bench.draw_batch(int(batch))
    space = bench.supernet.space
    for part, widths in (("widest", space.max()), ("narrowest", space.min())):
        eager = bench.supernet.extract(widths).train()
        compiled: Any = torch.compile(bench.supernet.extract(widths).train(), dynamic=False)
        start = time.perf_counter()
        bench.learn(compiled)
        bench.wait()
        seconds = time.perf_counter() - start

        def reset(_: int, networks: tuple[nn.Module, ...] = (eager, compiled)) -> None:
            for network in networks:
                for parameter in network.parameters():
                    parameter.grad = torch.zeros_like(parameter)

        pairs = bench.time_pairs(
            lambda _, network=compiled: bench.learn(network), lambda _, network=eager: bench.learn(network),  # type: ignore[misc]
            reset, 5, IN_ROW,
        )  # fmt: skip
        yield {"question": "compile", "model": model, "batch": int(batch), "subnet": part, "seconds": seconds,
               **summarize(pairs)}  # fmt: skip


def make_compile_table(rows: list[Row]) -> str:
    """Return the table of compiled subnets; empty if there are no rows."""
    rows = [row for row in rows if row.get("question") == "compile"]
    lines = ["| GPU | model, batch | subnet | compiled over eager | seconds to compile |", "|---|---|---|---|---|"]
    for row in rows:
        times = _show(*(row[key] for key in ("ratio", "low", "high", "ours", "theirs")))
        lines.append(
            f"| {row['device']} | {row['model']}, {row['batch']} | {row['subnet']} | {times} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) if rows else ""


def measure_memory(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Compare `peak_bytes` with CUDA's allocator, and `measure_latency` with CUDA's events and a CUDA graph."""
    bench = make_bench(name, args, amp=False)
    batch = 2 if args.toy else 32
    bench.inputs, bench.targets = bench.draw_batch(batch)
    supernet = bench.supernet.eval()
    for share in (1.0, 0.5):
        widths = supernet.space.uniform(share)
        for dtype in (torch.float32, torch.float16):
            model = supernet.extract(widths).eval().to(dtype)
            inputs = bench.inputs.to(dtype)
            counted = cost(supernet, widths, batch_size=batch, dtype=dtype).peak_bytes
            row: Row = {"question": "memory", "share": share, "dtype": str(dtype)[6:], "batch": batch,
                        "peak_bytes": counted}  # fmt: skip
            if bench.device.type == "cuda":
                row["allocated"] = measure_peak(model, inputs)
                with torch.no_grad():
                    row["events_ms"] = time_events(functools.partial(model, inputs))
                    row["graph_ms"] = time_events(RUNTIMES["cudagraph"].start(model, inputs, 1))
            repeats = 3 if args.toy else 10
            row["latency_ms"] = measure_latency(model, inputs, device=args.device, repeats=repeats)
            yield row


def list_predictions(args: argparse.Namespace) -> list[str]:
    """Return the models whose latency is predicted, with the batch."""
    return ["resnet10t 2"] if args.toy else ["resnet50 1", "mobilenetv2_100 1", "resnet50 32"]


def measure_prediction(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Compare the latency that a table predicts with what is measured, of subnets that its fit has not seen."""
    model, batch = name.split()
    bench = make_bench(model, args, amp=False)
    space = bench.supernet.eval().space
    for runtime in ("eager", "cudagraph") if bench.device.type == "cuda" else ("eager",):
        start = time.perf_counter()
        dtype = torch.float16 if bench.device.type == "cuda" else None
        table = LatencyTable(
            device=args.device, threads=torch.get_num_threads(), batch_size=int(batch), dtype=dtype, runtime=runtime
        )
        subnets = [space.sample(torch.Generator().manual_seed(seed)) for seed in range(3)]
        report = table.report(bench.supernet, [*subnets, space.uniform(0.5), space.uniform(0.8)], rounds=3)
        yield {"question": "prediction", "model": model, "batch": int(batch), "runtime": runtime,
               "measured": report.measured_ms, "predicted": report.predicted_ms, "median_error": report.median_error,
               "operators": len(table), "seconds": time.perf_counter() - start}  # fmt: skip


def make_prediction_table(rows: list[Row]) -> str:
    """Return the table of predicted latencies; empty if there are no rows."""
    rows = [row for row in rows if row.get("question") == "prediction"]
    lines = ["| model, batch | runtime | measured, ms | predicted, ms | median error |", "|---|---|---|---|---|"]
    for row in rows:
        measured, predicted = (", ".join(f"{ms:.2f}" for ms in row[key]) for key in ("measured", "predicted"))
        name, error = f"{row['model']}, {row['batch']}", f"{100 * row['median_error']:.1f} %"
        lines.append(f"| {name} | {row['runtime']} | {measured} | {predicted} | {error} |")
    return "\n".join(lines) if rows else ""


def measure_peak(model: nn.Module, inputs: Tensor) -> int:
    """Return the bytes of weights and activations at the peak of one forward, as CUDA's allocator counts them."""
    weights = sum(t.nbytes for t in model.state_dict().values())
    with torch.no_grad():
        model(inputs)  # libraries take their workspaces
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(inputs)
        torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before + weights + inputs.nbytes)


def time_events(run: Callable[[], Any], repeats: int = 20) -> float:
    """Return the milliseconds of a call between two CUDA events: the median."""
    times: list[float] = []
    for _ in range(repeats + 3):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times[3:])


def make_memory_table(rows: list[Row]) -> str:
    """Return the table of memory and latency; empty if there are no rows."""
    rows = [row for row in rows if row.get("question") == "memory" and "allocated" in row]
    if not rows:
        return ""
    lines = [
        "| model | width | type | batch | peak_bytes, MiB | allocated, MiB | ratio "
        "| measure_latency, ms | CUDA events, ms | CUDA graph, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["case"], f"{row['share']:g}", row["dtype"], str(row["batch"]), f"{row['peak_bytes'] / 2**20:.1f}",
                 f"{row['allocated'] / 2**20:.1f}", f"{row['allocated'] / row['peak_bytes']:.2f}",
                 f"{row['latency_ms']:.2f}", f"{row['events_ms']:.2f}", f"{row['graph_ms']:.2f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
