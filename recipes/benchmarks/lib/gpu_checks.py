"""On a GPU: that subnets, searches and trainings give what they must."""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from timm_autoslim import RUNTIMES, HeldOut, Supernet, Widths, calibrate, convert, export, sandwich_step, search
from timm_autoslim.recipes.benchmarks.lib.images import load_digits

Row = dict[str, Any]

# One small model of each family, with the arguments that make it smaller and the side of its images.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "resnet26t": ({}, 96),
    "mobilenetv3_small_100": ({}, 96),
    "tf_efficientnet_lite0": ({}, 96),
    "regnety_002": ({}, 96),
    "densenet121": ({"block_config": (2, 2, 4, 2)}, 96),
    "repvgg_a0": ({}, 64),
    "convnext_atto": ({}, 96),
    "vit_tiny_patch16_224": ({"depth": 4}, 224),
    "swin_tiny_patch4_window7_224": ({"depths": (1, 1, 2, 1)}, 224),
    "mixer_s32_224": ({}, 224),
    "levit_128s": ({}, 224),
    "edgenext_xx_small": ({}, 96),
    "poolformerv2_s12": ({}, 96),
    "xcit_nano_12_p16_224": ({"depth": 4}, 224),
}
PRECISIONS = ("float32", "bfloat16", "float16")


def list_families(args: argparse.Namespace) -> list[str]:
    """Return the names of the models whose subnets are compared."""
    return ["resnet26t", "vit_tiny_patch16_224"] if args.toy else list(FAMILIES)


def measure_equality(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Compare the half-wide and a random subnet with their extracted and reloaded models, in every precision."""
    device, (kwargs, size) = torch.device(args.device), FAMILIES[name]
    torch.backends.cudnn.deterministic = True  # else two backward passes of one model differ already
    for precision in PRECISIONS:
        if precision == "float16" and device.type == "cpu":
            continue
        layout = torch.contiguous_format if precision == "float32" else torch.channels_last
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10, **kwargs).to(device, memory_format=layout)
        supernet = convert(model, torch.zeros(2, 3, size, size, device=device))
        images = torch.randn(8, 3, size, size).to(device, memory_format=layout)
        targets = torch.randint(10, (8,)).to(device)
        for kind in ("half", "random") if precision == "float32" else ("half",):
            space = supernet.space
            widths = space.uniform(0.5) if kind == "half" else space.sample(torch.Generator().manual_seed(1))
            row: Row = {"question": "equality", "precision": precision, "widths": kind}
            yield (
                row
                | compare_outputs(supernet, widths, images, precision)
                | compare_gradients(supernet, widths, images, targets, precision)
            )


def compare_outputs(supernet: Supernet, widths: Widths, images: Tensor, precision: str) -> Row:
    """Compare the outputs in eval mode: of the subnet, of its extracted model, and of the folder loaded again."""
    supernet.eval()
    extracted = supernet.extract(widths).eval()
    calibrate(extracted, [images])
    with torch.no_grad(), autocast(images.device, precision), tempfile.TemporaryDirectory() as folder:
        raw = supernet.extract(widths).eval()(images)
        subnet = supernet(images, widths)
        outputs = extracted(images)
        export(extracted, Path(folder) / "slim")
        loaded = timm.create_model(f"local-dir:{folder}/slim", pretrained=True)
        layout = torch.channels_last if precision != "float32" else torch.contiguous_format
        again = loaded.to(images.device, memory_format=layout).eval()(images)
    return {
        "subnet_equal": torch.equal(subnet, raw), "subnet_gap": gap(subnet, raw),
        "reload_equal": torch.equal(outputs, again), "reload_gap": gap(outputs, again),
        "finite": bool(outputs.isfinite().all()),
    }  # fmt: skip


def compare_gradients(supernet: Supernet, widths: Widths, images: Tensor, targets: Tensor, precision: str) -> Row:
    """Compare the gradients in training mode with those of the extracted model."""
    extracted = supernet.extract(widths).train()
    supernet.train()
    supernet.zero_grad()
    rates = [module for module in (*supernet.modules(), *extracted.modules()) if hasattr(module, "drop_prob")]
    for module in (*rates, *(m for n in (supernet, extracted) for m in n.modules() if isinstance(m, nn.Dropout))):
        setattr(module, "drop_prob" if hasattr(module, "drop_prob") else "p", 0.0)
    for run in (functools.partial(supernet, images, widths), functools.partial(extracted, images)):
        with autocast(images.device, precision):
            loss = F.cross_entropy(run(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
    slices = copy.deepcopy(supernet)  # its weights are the gradients, so that extracting slices them
    with torch.no_grad():
        for parameter, source in zip(slices.parameters(), supernet.parameters(), strict=True):
            parameter.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    ours = dict(slices.extract(widths).named_parameters())
    theirs = {name: parameter.grad for name, parameter in extracted.named_parameters() if parameter.grad is not None}
    gaps = {name: gap(ours[name], gradient) for name, gradient in theirs.items()}
    different = [name for name, gradient in theirs.items() if not torch.equal(ours[name], gradient)]
    return {"gradients": len(theirs), "gradients_different": len(different), "gradient_gap": max(gaps.values()),
            "first_different": different[-1] if different else None}  # fmt: skip


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision."""
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "float32")


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    ours, theirs = ours.detach(), theirs.detach()
    if torch.equal(ours, theirs):  # infinities included
        return 0.0
    difference, largest = (ours - theirs).abs().max(), theirs.abs().max().clamp_min(1e-30)
    return float(difference / largest)


def make_equality_table(rows: list[Row]) -> str:
    """Return the table of equalities, a line for each model and precision; empty if there are no rows."""
    lines = [
        "| model | precision | subnet = extracted | reloaded = exported | gradients that differ | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("question") == "equality":
            cells.setdefault((row["case"], row["precision"]), []).append(row)
    for (model, precision), members in cells.items():
        subnet = all(row["subnet_equal"] for row in members)
        reload_ = all(row["reload_equal"] for row in members)
        different, total = (sum(row[key] for row in members) for key in ("gradients_different", "gradients"))
        worst = max(max(row["gradient_gap"], row["subnet_gap"]) for row in members)
        says = ["bit for bit" if equal else "no" for equal in (subnet, reload_)]
        lines.append(f"| {model} | {precision} | {says[0]} | {says[1]} | {different} of {total} | {worst:.1e} |")
    return "\n".join(lines) if cells else ""


def list_searches(args: argparse.Namespace) -> list[str]:
    """Return the names of the models that are searched."""
    return ["resnet10t"] if args.toy else ["resnet10t", "mobilenetv2_050", "vit_tiny_patch16_224"]


def measure_search(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Search one trained supernet on the device and on the CPU, and compare widths and losses."""
    device, cpu = torch.device(args.device), torch.device("cpu")
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 3} if "vit" in name else {}
    images, targets = (tensor.to(device) for tensor in load_digits())
    supernet = convert(timm.create_model(name, num_classes=10, **kwargs), torch.zeros(2, 3, 32, 32)).to(device)
    supernet.train()
    optimizer = torch.optim.AdamW(supernet.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(4 if args.toy else 60):
        batch = slice(step * 64 % 1024, step * 64 % 1024 + 64)
        sandwich_step(supernet, supernet.space, images[batch], targets[batch], F.cross_entropy, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
    results, seconds = {}, {}
    for place in (device, cpu):
        held_out = [(images[i : i + 128].to(place), targets[i : i + 128].to(place)) for i in range(1024, 1536, 128)]
        start = time.perf_counter()
        results[place.type] = search(
            copy.deepcopy(supernet).to(place), {"macs": ["60%", "30%"]}, HeldOut(held_out, score)
        )
        seconds[place.type] = time.perf_counter() - start
    ours, theirs = results[device.type], results["cpu"]
    trails = [[(step.group, step.width) for step in result.steps] for result in (ours, theirs)]
    agree = next((i for i, pair in enumerate(zip(*trails, strict=False)) if pair[0] != pair[1]), len(trails[0]))
    yield {
        "question": "search", "steps": len(trails[0]), "steps_that_agree": agree,
        "same_widths": [a.widths == b.widths for a, b in zip(ours.networks, theirs.networks, strict=True)],
        "losses": [[n.loss for n in result.networks] for result in (ours, theirs)],
        "loss_gap": max((abs(a.loss - b.loss) for a, b in zip(ours.steps[:agree], theirs.steps[:agree], strict=True)),
                        default=0),
        "evaluations": ours.evaluations, "seconds": seconds[device.type], "seconds_cpu": seconds["cpu"],
        "ms_per_evaluation": 1e3 * seconds[device.type] / ours.evaluations,
        **time_graph(supernet.eval(), images[:128]),
    }  # fmt: skip


@torch.no_grad()
def time_graph(supernet: Supernet, images: Tensor) -> Row:
    """Time a candidate on 4 and on 20 batches, as calls and as a CUDA graph that is recorded and replayed."""
    if images.device.type != "cuda":
        return {}
    row: Row = {}
    for count in (4, 20):
        for kind in ("calls", "graph") * 2:  # the second time counts
            torch.cuda.synchronize()
            start = time.perf_counter()
            subnet = supernet.subnet(supernet.space.uniform(0.5))
            replay = RUNTIMES["eager" if kind == "calls" else "cudagraph"].start(subnet, images, 1)
            for _ in range(count):
                replay()
            torch.cuda.synchronize()
            row[f"{kind}_{count}_ms"] = 1e3 * (time.perf_counter() - start)
    return row


def score(subnet: Any, batch: Any) -> float:
    """Return the loss of a subnet on a batch of images (N, 3, H, W) and classes (N,)."""
    return F.cross_entropy(subnet(batch[0]), batch[1]).item()


def list_trainings(args: argparse.Namespace) -> list[str]:
    """Return the kinds of training."""
    return ["overflow", "bfloat16", "resume"] if args.toy else ["overflow", "bfloat16", "float16", "nccl", "resume"]


TRAIN = ("-c", "recipes/configs/digits.yaml", "--epochs", "2", "--warmup-epochs", "0", "--log-interval", "5",
         "--val-interval", "2", "--val-widths", "--limit-train", "400", "--calibration-images", "64")  # fmt: skip


def measure_training(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Train on digits with recipes/train.py, or one float16 step whose gradients overflow."""
    if name == "overflow":
        yield measure_overflow(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        if name == "resume":
            yield compare_resumed(Path(folder), args)
            return
        flags = {
            "bfloat16": ["--amp", "--channels-last"],
            "float16": ["--amp", "--amp-dtype", "float16", "--channels-last"],
            "nccl": ["--sync-bn"],
        }[name]
        start = time.perf_counter()
        run_recipe(Path(folder), name, flags, args, processes=name == "nccl")
        rows = list(csv.DictReader((Path(folder) / name / "summary.csv").open(encoding="utf-8")))
        yield {"question": "training", "seconds": time.perf_counter() - start, "summary": rows[-1]}


def run_recipe(folder: Path, name: str, flags: list[str], args: argparse.Namespace, *, processes: bool = False) -> None:
    """Run recipes/train.py on the device, under a launcher of several processes (here one) if `processes`."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", "29577"] if processes else []
    command = [
        sys.executable,
        *launch,
        "recipes/train.py",
        *TRAIN,
        *flags,
        "--output",
        str(folder),
        "--experiment",
        name,
    ]
    result = subprocess.run(command, env=make_environment(args), capture_output=True, text=True, timeout=100)
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr[-400:]}")


def make_environment(args: argparse.Namespace) -> dict[str, str]:
    """Return the environment of a recipe: the package of this checkout, deterministic cuBLAS, a CPU where asked for."""
    root = str(Path(__file__).resolve().parents[3])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return environment | ({"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})


def compare_resumed(folder: Path, args: argparse.Namespace) -> Row:
    """Compare a training that is killed after its first epoch and resumed with two that are not."""
    with ThreadPoolExecutor() as pool:
        same = ["--deterministic"]  # else two trainings of the same seed differ already, on a GPU
        others = [pool.submit(run_recipe, folder, name, same, args) for name in ("first", "second")]
        command = [sys.executable, "recipes/train.py", *TRAIN, *same, "--output", str(folder), "--experiment", "killed"]
        silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=make_environment(args), **silent)
        while process.poll() is None and not list(folder.glob("killed/checkpoints/*")):
            time.sleep(0.02)
        killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        run_recipe(folder, "killed", [*same, "--resume"], args)
        for other in others:
            other.result()
    states = {
        name: load_file(next((folder / name).glob("supernet*.safetensors"))) for name in ("first", "second", "killed")
    }
    row: Row = {"question": "resume", "killed": killed}
    for name in ("second", "killed"):
        gaps = {key: gap(states[name][key].float(), states["first"][key].float()) for key in states["first"]}
        equal = all(torch.equal(states[name][key], states["first"][key]) for key in states["first"])
        row |= {f"{name}_equal": equal, f"{name}_gap": max(gaps.values())}
    return row


def measure_overflow(args: argparse.Namespace) -> Row:
    """Let the gradients of float16 sandwich steps overflow: they are skipped, weights stay, the next ones are made."""
    device = torch.device(args.device)
    half = device.type == "cuda"
    scaler = GradScalerKwargs(init_scale=2.0**40)  # so that the first gradients overflow
    accelerator = Accelerator(mixed_precision="fp16" if half else None, cpu=not half, kwargs_handlers=[scaler])
    torch.manual_seed(0)
    supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(2, 3, 32, 32)).train()
    network, optimizer = accelerator.prepare(supernet, torch.optim.SGD(supernet.parameters(), 0.1))
    images, targets = (tensor[:64].to(device) for tensor in load_digits())
    skipped, moved, finite, scales = [], [], [], []
    for index in range(40 if half else 2):
        before = [parameter.detach().clone() for parameter in supernet.parameters()]
        generator = torch.Generator().manual_seed(index)
        sandwich_step(
            network,
            supernet.space,
            images,
            targets,
            F.cross_entropy,
            generator=generator,
            backward=accelerator.backward,
        )
        optimizer.step()
        skipped.append(bool(half and accelerator.optimizer_step_was_skipped))
        optimizer.zero_grad()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, supernet.parameters(), strict=True)))
        finite.append(all(bool(parameter.isfinite().all()) for parameter in supernet.parameters()))
        scales.append(accelerator.scaler.get_scale() if half else 1.0)
    return {
        "question": "overflow", "skipped": sum(skipped), "steps": len(skipped), "finite": all(finite),
        "moved_when_skipped": sum(m and s for m, s in zip(moved, skipped, strict=True)),
        "still_when_made": sum(not m and not s for m, s in zip(moved, skipped, strict=True)),
        "scales": [scales[0], scales[-1]],
    }  # fmt: skip


def make_graph_sentence(row: Row) -> str:
    """Return what a CUDA graph of one candidate costs; empty if it was not timed."""
    if "graph_4_ms" not in row:
        return ""
    says = (
        f"{row[f'graph_{n}_ms']:.0f} ms as a CUDA graph on {n} batches, {row[f'calls_{n}_ms']:.0f} without"
        for n in (4, 20)
    )
    return f" One subnet takes {', '.join(says)}."


def make_training_table(rows: list[Row]) -> str:
    """Return a list of what searches and trainings gave; empty if there are no rows."""
    lines = []
    for row in rows:
        question = row.get("question")
        if question == "search":
            lines.append(
                f"- Search on {row['case']}: {row['steps_that_agree']} of {row['steps']} steps as on the CPU (losses "
                f"differ by at most {row['loss_gap']:.1e}), the same widths for {sum(row['same_widths'])} of "
                f"{len(row['same_widths'])} budgets; {row['ms_per_evaluation']:.1f} ms for a subnet."
                + make_graph_sentence(row)
            )
        elif question == "training":
            summary = row["summary"]
            losses = ", ".join(
                f"{key} {float(summary[key]):.3f}" for key in summary if key.endswith("loss") and summary[key]
            )
            lines.append(f"- Training, {row['case']}: {losses}.")
        elif question == "resume":
            says = {True: "equal, bit for bit", False: "not equal"}
            lines.append(
                f"- A training killed and resumed: {says[row['killed_equal']]} (largest difference "
                f"{row['killed_gap']:.1e}); the same training a second time: {says[row['second_equal']]} "
                f"({row['second_gap']:.1e})."
            )
        elif question == "overflow":
            lines.append(
                f"- float16: {row['skipped']} of {row['steps']} steps overflowed and were skipped; weights moved in "
                f"{row['moved_when_skipped']} of these."
            )
    return "\n".join(lines)
