"""Time and memory of training a supernet, over those of the extracted models: a table in docs/benchmarks.md.

    python recipes/benchmarks/speed.py --table docs/benchmarks.md                        # on one CPU core
    python recipes/benchmarks/speed.py --device cuda --amp --channels-last --size 224 --batches 32 128

Three questions, each answered by ratios that are taken in one run, ours and theirs by turns (median of the pairs):

- half: forward and backward of the half-wide subnet in the supernet, over those of the same model extracted; with no
  gradient there yet, and with gradients to add to, as for all subnets but the widest in a step.
- step: one sandwich step (widest, narrowest, two random ones, new in every step), over the sum of the four extracted
  models' steps with the same losses.
- memory: the peak of three sandwich steps with SGD and momentum, over that of the same steps of the base alone; each
  in a process of its own: resident memory beyond the imports on a CPU (freed blocks of 64 KiB are returned at once),
  CUDA's allocator on a GPU.

On a CPU, times depend on what glibc's malloc does with freed memory: memory that was returned to the system costs page
faults when it is needed again. So "half" and "step" are timed in a process that returns none (no page faults for
either), and "defaults" is "half" again with malloc's defaults, with the system's share of the time.

Results are one JSON line each; a run that is started again goes on with what it lacks.
"""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_autoslim import (
    Widths,
    convert,
    reorder_channels,  # noqa: F401  (an import at its first use would count as memory of the training)
    sandwich_step,
    soft_cross_entropy,
)
from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table

MODELS = ("resnet50", "mobilenetv2_100", "vit_tiny_patch16_224")
QUESTIONS = ("half", "defaults", "step", "memory")
SETTING = ("model", "batch", "size", "device", "threads", "amp", "channels_last", "torch")
# Settings of glibc's malloc: keep every page, or return freed blocks of 64 KiB at once.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else it keeps holes between activations of many sizes


class Bench(nn.Module):
    """One model in one setting, its supernet (channels in order of importance), and a batch.

    As a module it is the supernet under autocast.
    """

    def __init__(self, setting: dict[str, Any], base_only: bool = False) -> None:
        super().__init__()
        torch.set_num_threads(setting["threads"])
        torch.manual_seed(0)
        self.device, self.amp, size = torch.device(setting["device"]), setting["amp"], setting["size"]
        self.clock = time.process_time if self.device.type == "cpu" and setting["threads"] == 1 else time.perf_counter
        try:
            model = timm.create_model(setting["model"], img_size=size)
        except TypeError:  # takes images of any size
            model = timm.create_model(setting["model"])
        self.size, self.layout = size, torch.channels_last if setting["channels_last"] else torch.contiguous_format
        self.inputs, self.targets = self.draw_batch(setting["batch"])
        self.model = model.to(self.device, memory_format=self.layout).train()
        if not base_only:
            self.supernet = convert(self.model, torch.zeros(2, 3, size, size), order="l1").train()

    def draw_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Return so many images (N, C, H, W) and their classes (N)."""
        inputs = torch.randn(count, 3, self.size, self.size).to(self.device, memory_format=self.layout)
        return inputs, torch.randint(0, 1000, (count,)).to(self.device)

    def time_pairs(
        self,
        ours: Callable[[int], Any],
        theirs: Callable[[int], Any],
        reset: Callable[[int], None],
        n: int,
        in_row: int,
    ) -> list[Any]:
        """Run both by turns, once to warm up and `n` times; return the seconds of both, in all and in the system.

        All three functions take the index of the pair; `reset` is called before each of the two others. Each of these
        is called `in_row` times, with no wait for the GPU in between, and the seconds are those of one call.
        """
        pairs = []
        for index in range(n + 1):
            times = []
            for run in (ours, theirs) if index % 2 else (theirs, ours):
                reset(index)
                self.wait()
                start, system = self.clock(), read_system_time()
                for _ in range(in_row):
                    run(index)
                self.wait()
                times.append(((self.clock() - start) / in_row, (read_system_time() - system) / in_row))
            pairs.append(tuple(times if index % 2 else reversed(times)))
        return pairs[1:]

    def wait(self) -> None:
        """Wait until the GPU has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forward(self, inputs: Tensor, widths: Widths) -> Tensor:
        """Run a subnet under autocast: logits (N, classes) of inputs (N, C, H, W)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits: Tensor = self.supernet(inputs, widths)
        return logits

    def learn(self, network: Callable[..., Tensor], *widths: Any, teacher: Tensor | None = None) -> Tensor:
        """Run forward and backward of one network; return its detached output (N, classes)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            outputs = network(self.inputs, *widths)
        loss = F.cross_entropy(outputs, self.targets) if teacher is None else soft_cross_entropy(outputs, teacher)
        loss.backward()  # type: ignore[no-untyped-call]
        return outputs.detach()

    def run_sandwich(self, seed: int) -> None:
        """Run one sandwich step without the optimizer."""
        generator = torch.Generator().manual_seed(seed)
        sandwich_step(self, self.supernet.space, self.inputs, self.targets, F.cross_entropy, generator=generator)


def measure_half(bench: Bench, repeats: int, in_row: int = 1) -> dict[str, Any]:
    """Time the half-wide subnet over its extracted model, each so often in a row."""
    widths = bench.supernet.space.uniform(0.5)
    extracted = bench.supernet.extract(widths).train()
    result: dict[str, Any] = {}
    for name, empty in (("fresh", True), ("added", False)):

        def reset(_: int, empty: bool = empty) -> None:
            for network in (bench.supernet, extracted):
                for parameter in network.parameters():
                    parameter.grad = None if empty else torch.zeros_like(parameter)

        pairs = bench.time_pairs(
            lambda _: bench.learn(bench.supernet, widths), lambda _: bench.learn(extracted), reset, repeats, in_row
        )
        result |= {f"{name}_{key}": value for key, value in summarize(pairs).items()}
    return result


def measure_step(bench: Bench, repeats: int, in_row: int = 1) -> dict[str, Any]:
    """Time a sandwich step over the sum of its extracted models' steps, each so often in a row."""
    space = bench.supernet.space
    widest, narrowest = (bench.supernet.extract(widths).train() for widths in (space.max(), space.min()))
    models: dict[int, list[nn.Module]] = {}  # of the current pair: a training draws new widths in every step

    def theirs(index: int) -> None:
        teacher = bench.learn(widest)
        for model in models[index][1:]:
            bench.learn(model, teacher=teacher)

    def reset(index: int) -> None:
        if index not in models:
            generator = torch.Generator().manual_seed(index)  # as the sandwich step draws them
            random = [bench.supernet.extract(space.sample(generator)).train() for _ in range(2)]
            models.clear()
            models[index] = [widest, narrowest, *random]
            bench.run_sandwich(index)  # libraries plan for new shapes at their first use, whoever comes first
            theirs(index)
        for network in (bench.supernet, *models[index]):
            network.zero_grad()

    return summarize(bench.time_pairs(bench.run_sandwich, theirs, reset, repeats, in_row))


def measure_times(question: str, setting: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Answer a question about time in one setting."""
    measure = measure_step if question == "step" else measure_half
    return measure(Bench(setting), repeats)


def summarize(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> dict[str, float]:
    """Return the median and the quartiles of the ratios, and median milliseconds, in all and in the system."""
    low, middle, high = statistics.quantiles([ours[0] / theirs[0] for ours, theirs in pairs], n=4, method="inclusive")
    result = {"ratio": middle, "low": low, "high": high}
    for name, times in zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True):
        total, system = (statistics.median(part) * 1e3 for part in zip(*times, strict=True))
        result |= {name: total, f"{name}_system": system}
    return result


def read_system_time() -> float:
    """Return the seconds that the system has worked for this process: on a CPU, mostly for page faults."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def measure_memory(setting: dict[str, Any]) -> dict[str, Any]:
    """Measure the peak memory of sandwich steps over that of ordinary steps of the base, in MiB."""
    ours, theirs = (run_in_process(run_steps, (setting, kind), GIVE_BACK) for kind in ("sandwich", "base"))
    return {"ratio": ours / theirs, "ours": ours, "theirs": theirs}


def run_in_process(function: Callable[..., Any], arguments: tuple[Any, ...], malloc: dict[str, str]) -> Any:
    """Call a function of this file in a fresh process, with these settings of malloc."""
    os.environ.update(malloc)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, arguments)
    finally:
        for name in malloc:
            del os.environ[name]


def run_steps(setting: dict[str, Any], kind: str) -> float:
    """Run three steps with SGD and momentum; return the peak memory beyond the imports, in MiB."""
    before = read_memory("VmRSS")
    bench = Bench(setting, base_only=kind == "base")
    network: nn.Module = bench.model if kind == "base" else bench.supernet
    if kind == "sandwich":
        del bench.model  # an order makes a copy
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    for index in range(3):
        if kind == "base":
            bench.learn(network)
        else:
            bench.run_sandwich(index)
        optimizer.step()
        optimizer.zero_grad()
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return read_memory("VmHWM") - before


def read_memory(kind: str) -> float:
    """Return the resident memory of this process in MiB: now (VmRSS), or its peak (VmHWM)."""
    # getrusage's peak may be that of the parent process
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{kind}:")[2].split()[0]) / 2**10


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the table, one line for each model and setting."""
    lines = [
        "| setting | model | batch | half, no gradient yet | half, added | half, added, malloc's defaults "
        "| step over four | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        rows.setdefault(tuple(result["setting"][k] for k in SETTING), {})[result["question"]] = result
    for key, by_question in sorted(rows.items(), key=lambda row: (row[0][3], row[0][4], *map(str, row[0]), row[0][1])):
        setting = dict(zip(SETTING, key, strict=True))
        words = [setting["device"], f"{setting['threads']} thread(s)", f"{setting['size']} px"]
        words += [name for name, on in (("bf16", setting["amp"]), ("NHWC", setting["channels_last"])) if on]
        cells = [
            _show_times(by_question.get("half"), "fresh_"), _show_times(by_question.get("half"), "added_"),
            _show_times(by_question.get("defaults"), "added_", system=True), _show_times(by_question.get("step"), ""),
            _show_memory(by_question.get("memory")),
        ]  # fmt: skip
        lines.append(f"| {', '.join(words)} | {setting['model']} | {setting['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _show_times(result: dict[str, Any] | None, prefix: str, system: bool = False) -> str:
    if result is None:
        return ""
    ratio, low, high, ours, theirs = (result[prefix + key] for key in ("ratio", "low", "high", "ours", "theirs"))
    shares = (result[f"{prefix}{name}_system"] for name in ("ours", "theirs"))
    share = ", of it in the system {:.0f} / {:.0f}".format(*shares) if system else ""
    return f"{ratio:.2f} ({low:.2f} to {high:.2f}; {ours:.0f} / {theirs:.0f} ms{share})"


def _show_memory(result: dict[str, Any] | None) -> str:
    return "" if result is None else "{ratio:.2f} ({ours:.0f} / {theirs:.0f} MiB)".format(**result)


def main() -> None:
    """Measure what has no result yet, and write the table."""
    parser = make_parser(__doc__, "runs/speed.jsonl")
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
    with contextlib.closing(tqdm(todo, unit="measurement")) as bar:
        for question, setting in bar:
            bar.set_postfix_str(f"{setting['model']}, batch {setting['batch']}: {question}")
            if question == "memory":
                figures = measure_memory(setting)
            else:
                malloc = {} if question == "defaults" else KEEP
                figures = run_in_process(measure_times, (question, setting, args.repeats), malloc)
            results.add({"question": question, "setting": setting, **figures})
    print(make_table(results))
    if args.table:
        put_table(args.table, "speed", make_table(results))


if __name__ == "__main__":
    main()
