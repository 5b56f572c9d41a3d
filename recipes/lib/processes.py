"""Processes, device and precision of a recipe, through Accelerate."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, ProjectConfiguration
from timm.layers import convert_sync_batchnorm
from torch import nn

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.memory import keep_memory
from timm_autoslim.recipes.lib.texts import write_count
from timm_autoslim.recipes.lib.trackers import choose_trackers

REFUSED = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "A parallelism configuration": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


def make_accelerator(args: argparse.Namespace, folder: Path | None = None) -> Accelerator:
    """Set up processes, device and precision; with a folder, also the trackers that the flags ask for.

    Raises:
        ConfigError: Accelerate is configured for what cannot train a supernet, a tracker is not installed, or there is
            no GPU where the flags ask for one.
    """
    for name, variable in REFUSED.items():
        # DeepSpeed steps its engine in every backward, and the others flatten parameters that a subnet must slice.
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"{name} cannot train a supernet: a step has several backward passes over slices of the parameters. "
                "Launch with --multi_gpu (data parallelism) instead."
            )
    if args.device == "cuda" and not torch.cuda.is_available():  # Accelerate would take the CPU without a word
        raise ConfigError("--device cuda: torch finds no such GPU here. Leave the flag out to run on what there is.")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_memory()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's documentation on reproducibility
        torch.use_deterministic_algorithms(True, warn_only=True)
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}[args.amp_dtype] if args.amp else None,
        kwargs_handlers=[
            # Slicing gives every parameter a gradient, and each subnet is one forward: nothing to look for.
            DistributedDataParallelKwargs(find_unused_parameters=False, static_graph=False, broadcast_buffers=False)
        ],
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=(choose_trackers(args) or None) if folder else None,
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


def is_first() -> bool:
    """Whether this process is the first of those that the launcher has started, or works alone."""
    return os.environ.get("RANK", "0") == "0"


def describe_processes(accelerator: Accelerator) -> str:
    """Return how many processes work, and on which device."""
    return f"{write_count(accelerator.num_processes, 'process', 'processes')} on {accelerator.device}"


def synchronize_norms(accelerator: Accelerator, model: nn.Module) -> None:
    """Let the BatchNorms of a model, in place, take their statistics over the batches of all processes.

    Raises:
        ConfigError: there are several processes without GPUs, which torch's SyncBatchNorm does not support.
    """
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise ConfigError("--sync-bn needs GPUs: torch's SyncBatchNorm does not run on CPUs. Leave it out.")
    convert_sync_batchnorm(model)
