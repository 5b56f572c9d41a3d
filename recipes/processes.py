"""Processes, device, precision and trackers of a recipe, through Accelerate."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import platform
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, ProjectConfiguration
from timm.layers import convert_sync_batchnorm
from torch import nn

from timm_autoslim.errors import ConfigError
from timm_autoslim.utils.files import write_text

REFUSED = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "A parallelism configuration": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, from glibc's malloc.h
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def make_accelerator(args: argparse.Namespace, folder: Path | None = None) -> Accelerator:
    """Set up processes, device and precision; with a folder, also the trackers that the flags ask for.

    Raises:
        ConfigError: Accelerate is configured for what cannot train a supernet, or a tracker is not installed.
    """
    for name, variable in REFUSED.items():
        # DeepSpeed steps its engine in every backward, and the others flatten parameters that a subnet must slice.
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"{name} cannot train a supernet: a step has several backward passes over slices of the parameters. "
                "Launch with --multi_gpu (plain data parallelism) instead."
            )
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_memory()
    accelerator = Accelerator(
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}[args.amp_dtype] if args.amp else None,
        kwargs_handlers=[
            # Slicing gives every parameter a gradient, and each subnet is one forward: nothing to look for.
            DistributedDataParallelKwargs(find_unused_parameters=False, static_graph=False, broadcast_buffers=False)
        ],
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=(_trackers(args) or None) if folder else None,
        project_config=ProjectConfiguration(str(folder), str(folder / "tensorboard")) if folder else None,
    )
    if accelerator.gradient_accumulation_steps != 1:  # it would divide every loss, and exchange gradients as before
        raise ConfigError(
            f"accelerate was launched with --gradient_accumulation_steps {accelerator.gradient_accumulation_steps}: "
            "leave it out, and give the recipe --grad-accum-steps."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("float16 needs a GPU (CPUs would silently train in float32): give --amp-dtype bfloat16.")
    return accelerator


def keep_memory() -> bool:
    """Let malloc keep what it has, rather than give it back and fault it in again, page by page, for the next subnet.

    Subnets of ever other sizes make glibc's malloc do so all the time (docs/benchmarks.md has the cost). Other C
    libraries are left alone, and so is a malloc that the user has set by environment variables.

    Returns:
        Whether it was set.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))  # -1: never


def _trackers(args: argparse.Namespace) -> list[str]:
    asked = [name for name, wanted in (("tensorboard", args.log_tensorboard), ("wandb", args.log_wandb)) if wanted]
    for name in asked:
        if importlib.util.find_spec(name) is None:  # Accelerate would leave it out without a word
            raise ConfigError(f"--log-{name}: {name} is not installed: pip install {name}.")
    return asked


def start_trackers(accelerator: Accelerator, args: argparse.Namespace, folder: Path, total: int) -> None:
    """Open the trackers; those of a resumed run go on after `total` updates."""
    if not accelerator.log_with:
        return
    known = folder / "wandb_id.txt"  # so that a resumed run goes on with its curves
    if accelerator.is_main_process and args.log_wandb and not known.is_file():
        write_text(known, uuid.uuid4().hex[:16])
    accelerator.wait_for_everyone()
    settings: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": total + 1}}  # drops what was logged later
    if args.log_wandb:
        settings["wandb"] = {"id": known.read_text(encoding="utf-8"), "name": folder.name, "dir": str(folder),
                             "resume": "allow", "config": vars(args)}  # fmt: skip
    accelerator.init_trackers(args.wandb_project, init_kwargs=settings)


def synchronize_norms(accelerator: Accelerator, model: nn.Module) -> None:
    """Let the BatchNorms of a model, in place, take their statistics over the batches of all processes.

    Raises:
        ConfigError: there are several processes without GPUs, which torch's SyncBatchNorm does not support.
    """
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise ConfigError("--sync-bn needs GPUs: torch's SyncBatchNorm does not run on CPUs. Leave it out.")
    convert_sync_batchnorm(model)
