"""Curves of a training: trackers that are installed, and go on in a resumed run."""

import importlib.util
import sys
from types import SimpleNamespace

import accelerate
import pytest
from helpers.recipes import run_train

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib import trackers


def test_trackers_that_are_not_installed_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ConfigError, match=f"--log-{name}: {name} is not installed: pip install {name}"):
            run_train(tmp_path, "never", f"--log-{name}")


def test_a_resumed_run_is_the_same_run_at_weights_and_biases(tmp_path, monkeypatch):
    started, steps = [], []

    def start(**settings):
        started.append(settings)
        return SimpleNamespace(log=log, finish=print)

    def log(values, step, **_):
        steps.append((step, sorted(values)[:2]))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=start))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or find_spec(name))
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.utils.LoggerType.WANDB])
    run = run_train(tmp_path, "run", "--log-wandb", "--wandb-project", "mine", limit_train=64)
    run_train(tmp_path, "run", "--log-wandb", "--wandb-project", "mine", "--resume", epochs=2, limit_train=64)
    first, second = started
    assert first["project"] == "mine"
    assert first["id"] == second["id"] == (run / "wandb_id.txt").read_text()
    assert (first["resume"], first["name"], first["dir"]) == ("allow", "run", str(run))
    assert first["config"]["batch_size"] == 32
    assert [step for step, _ in steps] == [1, 1, 2, 2]
    assert [names[0] for _, names in steps] == ["lr", "val/images_per_s"] * 2
