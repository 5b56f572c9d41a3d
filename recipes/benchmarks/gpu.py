"""Everything that only a GPU can show: that results are right, how fast a step is, and one real training.

    python recipes/benchmarks/gpu.py --table docs/benchmarks.md              # all parts, on the first GPU
    python recipes/benchmarks/gpu.py --parts speed equality                  # some of them
    python recipes/benchmarks/gpu.py --device cpu --toy --results runs/toy.jsonl     # on a CPU, small: it runs

The parts, what matters most first. Each runs in processes of its own and is stopped at its time limit; all but cifar10,
which runs only where there is data, take at most nine minutes:

- equality: a dozen families of models. A subnet gives bit for bit what its extracted model gives, and that what the
  exported folder gives when it is loaded again; in float32, and in bfloat16 and float16 with channels last. Gradients.
- speed: a half-wide subnet over its extracted model, a sandwich step over its four extracted models, and how many
  kernels, milliseconds of kernels and waits each has.
- widths: how long a step takes whose random widths are new to cuDNN, by sampler.
- search: a search on the GPU and on the CPU finds the same widths; how long a candidate takes.
- training: recipes/train.py in bfloat16, in float16, with SyncBatchNorm over NCCL, and killed and resumed; and a
  float16 step whose gradients overflow is skipped.
- memory: `peak_bytes` beside what CUDA's allocator counts; latency: `measure_latency` beside CUDA's own events.
- prediction: what a `LatencyTable` predicts beside what is measured, in eager mode and as a CUDA graph.
- compile: what `torch.compile` makes of the widest and the narrowest subnet, which every step has.
- cifar10: ResNet-56 on CIFAR-10 (`--data-dir`, train.tar and test.tar of class folders): trained; slimmed to 2.11 and
  2.57 times fewer MACs by `slim`, and fine-tuned; and as a control the base fine-tuned alike. The trained base lies in
  `--checkpoints`.

Every result is a JSON line; a run that is started again goes on with what it lacks. Beside torch, torchvision,
accelerate and safetensors it needs timm, torch-pruning, tqdm, numpy, scikit-learn, pyyaml and pillow.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timm_autoslim.recipes.benchmarks.lib import gpu_checks, gpu_cifar, gpu_speed
from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One part of the benchmark.

    Attributes:
        list_cases: the names of its cases, of the options.
        measure: yields the rows of one case.
        seconds: its time limit.
        workers: processes that share its cases; one, where time is measured.
    """

    list_cases: Callable[[argparse.Namespace], list[str]]
    measure: Callable[[str, argparse.Namespace], Iterator[Row]]
    seconds: int
    workers: int = 1


PARTS = {
    "equality": Part(gpu_checks.list_families, gpu_checks.measure_equality, 100, 10),
    "speed": Part(gpu_speed.list_models, gpu_speed.measure_speed, 130),
    "widths": Part(gpu_speed.list_samplers, gpu_speed.measure_new_widths, 40, 2),
    "search": Part(gpu_checks.list_searches, gpu_checks.measure_search, 60),
    "training": Part(gpu_checks.list_trainings, gpu_checks.measure_training, 60, 5),
    "memory": Part(gpu_speed.list_models, gpu_speed.measure_memory, 45),
    "prediction": Part(gpu_speed.list_predictions, gpu_speed.measure_prediction, 45),
    "compile": Part(gpu_speed.list_compiled, gpu_speed.measure_compiled, 60),
    "cifar10": Part(gpu_cifar.list_stages, gpu_cifar.measure_stage, 300),
}


def run_cases(name: str, worker: int, args: argparse.Namespace) -> None:
    """Measure every case of a part that falls to this worker and has no result; an error becomes a row too."""
    part, results = PARTS[name], Results(args.results)
    done = {row["case"] for row in results if row["part"] == name and row.get("done")}
    for case in part.list_cases(args)[worker :: part.workers]:
        if case in done or (args.cases and case not in args.cases):
            continue
        common, start = {"part": name, "case": case, "device": name_device(args.device)}, time.perf_counter()
        row: Row = {}
        try:
            for row in part.measure(case, args):
                results.add(common | row)
        except Exception as error:
            text = "".join(traceback.format_exception(error, limit=-6))
            results.add(common | {"error": f"{type(error).__name__}: {error}"[:500], "traceback": text[-1500:]})
        else:
            results.add(common | {"done": True, "seconds": round(time.perf_counter() - start, 1)})


def name_device(device: str) -> str:
    """Return the name of the GPU, or the device's kind."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def run_part(name: str, args: argparse.Namespace) -> None:
    """Run a part in its processes, and stop them at its time limit."""
    part, context = PARTS[name], multiprocessing.get_context("spawn")
    start = time.monotonic()
    workers = min(part.workers, len(part.list_cases(args)))
    processes = [context.Process(target=run_cases, args=(name, worker, args)) for worker in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, (args.limit or part.seconds) - (time.monotonic() - start)))
        if process.is_alive():
            process.kill()
            process.join()
            print(f"{name}: stopped at its limit", flush=True)
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def make_tables(results: list[Row]) -> str:
    """Return the tables of all parts."""
    tables = [gpu_checks.make_equality_table, gpu_speed.make_speed_table, gpu_speed.make_compile_table,
              gpu_speed.make_widths_table,
              gpu_checks.make_training_table, gpu_speed.make_memory_table, gpu_speed.make_prediction_table,
              gpu_cifar.make_table]  # fmt: skip
    rows = [row for row in results if not row.get("done") and "error" not in row]
    texts = [table(rows) for table in tables]
    errors = [f"{row['part']}, {row['case']}: {row['error']}" for row in results if "error" in row]
    return "\n\n".join(text for text in (*texts, "\n".join(errors)) if text)


def main() -> None:
    """Run the parts that are asked for, and write the tables."""
    parser = make_parser(__doc__, "docs/results/gpu.jsonl")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="small models, few repeats")
    parser.add_argument("--cases", nargs="+", help="only these cases of the parts")
    parser.add_argument("--limit", type=int, help="seconds for each part, in place of its own limit")
    parser.add_argument("--data-dir", type=Path, help="folder of train.tar and test.tar, for cifar10")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/gpu"), help="folder of cifar10's stages")
    parser.add_argument("--epochs", type=int, nargs=2, default=(160, 100), help="cifar10: of the base, of fine-tuning")
    args = parser.parse_args()
    if not args.only_table:
        for name in args.parts:
            run_part(name, args)
    tables = make_tables(Results(args.results))
    print(tables)
    if args.table:
        put_table(args.table, "gpu", tables)


if __name__ == "__main__":
    main()
