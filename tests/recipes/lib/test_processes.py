"""What Accelerate is set up for, and what is refused."""

import argparse
import os

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.recipes import parse, run_train, write_config

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.processes import REFUSED, make_accelerator, synchronize_norms


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_engines_that_cannot_train_a_supernet_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(REFUSED[name], "true")
    with pytest.raises(ConfigError, match=f"{name} cannot train a supernet"):
        make_accelerator(parse("train", write_config(tmp_path)))


def test_accumulation_by_the_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ConfigError, match=r"--gradient_accumulation_steps 4: leave it out, .* --grad-accum-steps"):
        make_accelerator(parse("train", write_config(tmp_path)))


def test_synchronised_norms_need_gpus():
    two = argparse.Namespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="--sync-bn needs GPUs: torch's SyncBatchNorm does not run on CPUs"):
        synchronize_norms(two, torch.nn.ReLU())


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda: torch finds no such GPU here"):
        make_accelerator(parse("train", write_config(tmp_path), "--device", "cuda"))


def test_float16_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(ConfigError, match=r"float16 needs a GPU .* give --amp-dtype bfloat16"):
            run_train(tmp_path, "half", "--amp", "--amp-dtype", "float16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_deterministic_asks_torch_for_the_same_bits_every_time(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, warn_only: asked.append((mode, warn_only)))
    make_accelerator(parse("train", write_config(tmp_path)))
    assert not asked
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a user's own stays
    make_accelerator(parse("train", write_config(tmp_path), "--deterministic"))
    assert asked == [(True, True)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
