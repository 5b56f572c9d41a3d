"""Time and memory of training a supernet, over those of the extracted models: a table in docs/benchmarks.md.

    python recipes/benchmarks/speed.py --table docs/benchmarks.md                        # on one CPU core
    python recipes/benchmarks/speed.py --device cuda --amp --channels-last --size 224 --batches 32 128

Three questions, each answered by ratios that are taken in one run, ours and theirs by turns (median of the pairs):

- half: forward and backward of the half-wide subnet in the supernet, over those of the same model extracted; with no
  gradient there yet, and with gradients to add to, as all subnets but the widest find them in a step.
- step: one sandwich step (widest, narrowest, two random ones, new in every step), over the sum of the four extracted
  models' steps with the same losses.
- memory: the peak of three sandwich steps with SGD and momentum, over that of the same steps of the plain model; each
  in a process of its own: resident memory beyond the imports on a CPU (freed blocks of 64 KiB given back at once),
  CUDA's allocator on a GPU.

On a CPU, times depend on what glibc's malloc does with freed memory: whoever grows the heap after it was given back
pays for every page again. So "half" and "step" are timed in a process that keeps all it has (no page faults for
either), and "defaults" is "half" again with malloc as it is, with the system's share of the time.

Results are one JSON line each; a run that is started again goes on with what it lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from results import Results, put_table
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import timm_autoslim
import timm_autoslim.supernet.order  # not at its first use, which would count as memory of the training
from timm_autoslim.training.distillation import soft_cross_entropy

MODELS = ("resnet50", "mobilenetv2_100", "vit_tiny_patch16_224")
QUESTIONS = ("half", "defaults", "step", "memory")
SETTING = ("model", "batch", "size", "device", "threads", "amp", "channels_last", "torch")
# glibc's malloc, fixed: keep every page that it ever had, or give freed blocks of 64 KiB back at once.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else it keeps holes between activations of many sizes


class Bench:
    """One model in one setting, its supernet (channels in order of importance), and a batch."""

    def __init__(self, setting: dict[str, Any], plain_only: bool = False) -> None:
        torch.set_num_threads(setting["threads"])
        torch.manual_seed(0)
        self.device, self.amp, size = torch.device(setting["device"]), setting["amp"], setting["size"]
        self.clock = time.process_time if self.device.type == "cpu" and setting["threads"] == 1 else time.perf_counter
        try:
            model = timm.create_model(setting["model"], img_size=size)
        except TypeError:  # takes images of any size
            model = timm.create_model(setting["model"])
        inputs = torch.randn(setting["batch"], 3, size, size)  # (N, C, H, W)
        layout = torch.channels_last if setting["channels_last"] else torch.contiguous_format
        self.inputs = inputs.to(self.device, memory_format=layout)
        self.targets = torch.randint(0, 1000, (setting["batch"],)).to(self.device)
        self.model = model.to(self.device, memory_format=layout).train()
        if not plain_only:
            self.supernet = timm_autoslim.convert(self.model, torch.zeros(2, 3, size, size), order="l1").train()

    def pairs(self, ours: Callable[[], Any], theirs: Callable[[], Any], reset: Callable[[], None], n: int) -> Any:
        """Run both by turns, once to warm up and `n` times; returns the seconds of both, in all and in the system."""
        found = []
        for index in range(n + 1):
            times = []
            for run in (ours, theirs) if index % 2 else (theirs, ours):
                reset()
                self._wait()
                start, system = self.clock(), system_time()
                run()
                self._wait()
                times.append((self.clock() - start, system_time() - system))
            found.append(tuple(times if index % 2 else reversed(times)))
        return found[1:]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def learn(self, network: Callable[..., Tensor], *widths: Any, teacher: Tensor | None = None) -> Tensor:
        """Forward and backward of one network; returns its detached output (N, classes)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            outputs = network(self.inputs, *widths)
        loss = F.cross_entropy(outputs, self.targets) if teacher is None else soft_cross_entropy(outputs, teacher)
        loss.backward()
        return outputs.detach()

    def sandwich(self, generator: torch.Generator) -> None:
        """One sandwich step without the optimizer."""

        def network(inputs: Tensor, widths: timm_autoslim.Widths) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                return self.supernet(inputs, widths)

        timm_autoslim.sandwich_step(
            network, self.supernet.space, self.inputs, self.targets, F.cross_entropy, generator=generator
        )


def measure_half(setting: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The half-wide subnet over its extracted model."""
    bench = Bench(setting)
    widths = bench.supernet.space.uniform(0.5)
    plain = bench.supernet.extract(widths).train()
    result = {}
    for name, empty in (("fresh", True), ("added", False)):

        def reset(empty: bool = empty) -> None:
            for network in (bench.supernet, plain):
                for parameter in network.parameters():
                    parameter.grad = None if empty else torch.zeros_like(parameter)

        found = bench.pairs(lambda: bench.learn(bench.supernet, widths), lambda: bench.learn(plain), reset, repeats)
        result |= {f"{name}_{key}": value for key, value in summarise(found).items()}
    return result


def measure_step(setting: dict[str, Any], repeats: int) -> dict[str, Any]:
    """A sandwich step over the sum of its extracted models' steps."""
    bench = Bench(setting)
    space, draw = bench.supernet.space, torch.Generator().manual_seed(0)
    subnets = [space.max(), space.min(), space.sample(draw), space.sample(draw)]
    widest, *others = plains = [bench.supernet.extract(widths).train() for widths in subnets]

    def theirs() -> None:
        teacher = bench.learn(widest)
        for plain in others:
            bench.learn(plain, teacher=teacher)

    def reset() -> None:
        bench.supernet._cache.clear()  # a training draws new widths in every step
        for network in (bench.supernet, *plains):
            network.zero_grad()

    return summarise(bench.pairs(lambda: bench.sandwich(torch.Generator().manual_seed(0)), theirs, reset, repeats))


def summarise(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, float]:
    """Median of the ratios, the quartiles around it, and the medians in milliseconds, in all and in the system."""
    low, middle, high = statistics.quantiles([ours[0] / theirs[0] for ours, theirs in pairs], n=4, method="inclusive")
    result = {"ratio": middle, "low": low, "high": high}
    for name, times in zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True):
        whole, system = (statistics.median(part) * 1e3 for part in zip(*times, strict=True))
        result |= {name: whole, f"{name}_system": system}
    return result


def system_time() -> float:
    """Seconds that the system has worked for this process: on a CPU, for page faults above all."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def measure_memory(setting: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of sandwich steps over that of plain steps, in MiB."""
    ours, theirs = (in_process(steps, (setting, kind), GIVE_BACK) for kind in ("sandwich", "plain"))
    return {"ratio": ours / theirs, "ours": ours, "theirs": theirs}


def in_process(function: Callable[..., Any], arguments: tuple[Any, ...], malloc: dict[str, str]) -> Any:
    """Call a function of this file in a fresh process, whose malloc is set so."""
    os.environ.update(malloc)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, arguments)
    finally:
        for name in malloc:
            del os.environ[name]


def steps(setting: dict[str, Any], kind: str) -> float:
    """Three steps with SGD and momentum; returns the peak memory beyond the imports, in MiB."""
    before = resident()
    bench = Bench(setting, plain_only=kind == "plain")
    network = bench.model if kind == "plain" else bench.supernet
    if kind == "sandwich":
        del bench.model  # an order makes a copy
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    for index in range(3):
        if kind == "plain":
            bench.learn(network)
        else:
            bench.sandwich(torch.Generator().manual_seed(index))
        optimizer.step()
        optimizer.zero_grad()
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident("VmHWM") - before


def resident(kind: str = "VmRSS") -> float:
    """Resident memory of this process in MiB: now (VmRSS), or its peak (VmHWM; getrusage's is also the parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{kind}:")[2].split()[0]) / 2**10


def table(results: list[dict[str, Any]]) -> str:
    """Return the table, one line for each model and setting."""
    lines = [
        "| setting | model | batch | half, no gradient yet | half, added | half, added, malloc's defaults "
        "| step over four | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        rows.setdefault(tuple(result["setting"][k] for k in SETTING), {})[result["question"]] = result
    for key, found in sorted(rows.items(), key=lambda row: (row[0][3], row[0][4], *map(str, row[0]), row[0][1])):
        setting = dict(zip(SETTING, key, strict=True))
        words = [setting["device"], f"{setting['threads']} thread(s)", f"{setting['size']} px"]
        words += [name for name, on in (("bf16", setting["amp"]), ("NHWC", setting["channels_last"])) if on]
        cells = [
            _cell(found.get("half"), "fresh_"), _cell(found.get("half"), "added_"),
            _cell(found.get("defaults"), "added_", system=True), _cell(found.get("step"), ""),
            _memory(found.get("memory")),
        ]  # fmt: skip
        lines.append(f"| {', '.join(words)} | {setting['model']} | {setting['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(result: dict[str, Any] | None, prefix: str, system: bool = False) -> str:
    if result is None:
        return ""
    ratio, low, high, ours, theirs = (result[prefix + key] for key in ("ratio", "low", "high", "ours", "theirs"))
    shares = (result[f"{prefix}{name}_system"] for name in ("ours", "theirs"))
    share = ", of it in the system {:.0f} / {:.0f}".format(*shares) if system else ""
    return f"{ratio:.2f} ({low:.2f} to {high:.2f}; {ours:.0f} / {theirs:.0f} ms{share})"


def _memory(result: dict[str, Any] | None) -> str:
    return "" if result is None else "{ratio:.2f} ({ours:.0f} / {theirs:.0f} MiB)".format(**result)


def main() -> None:
    """Measure what is lacking, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/speed.jsonl"))
    parser.add_argument("--table", type=Path, help="write the table into this page")
    parser.add_argument("--only-table", action="store_true", help="measure nothing")
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm models")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--size", type=int, default=160, help="side of the images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; with one, CPU time is taken, else wall time"
    )
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    results = Results(args.results)
    done = [(r["question"], r["setting"]) for r in results]
    common = {"size": args.size, "device": args.device, "threads": args.threads, "amp": args.amp,
              "channels_last": args.channels_last, "torch": torch.__version__}  # fmt: skip
    todo = [
        (question, {"model": model, "batch": batch, **common})
        for model in args.models
        for batch in args.batches
        for question in args.questions
        if question != "defaults" or args.device == "cpu"
    ]
    todo = [] if args.only_table else [job for job in todo if job not in done]
    timed = {"half": (measure_half, KEEP), "defaults": (measure_half, {}), "step": (measure_step, KEEP)}
    with contextlib.closing(tqdm(todo, unit="measurement")) as bar:
        for question, setting in bar:
            bar.set_postfix_str(f"{setting['model']}, batch {setting['batch']}: {question}")
            if question == "memory":
                found = measure_memory(setting)
            else:
                measure, malloc = timed[question]
                found = in_process(measure, (setting, args.repeats), malloc)
            results.add({"question": question, "setting": setting, **found})
    print(table(results))
    if args.table:
        put_table(args.table, "speed", table(results))


if __name__ == "__main__":
    main()
