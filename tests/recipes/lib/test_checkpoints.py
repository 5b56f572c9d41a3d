"""Checkpoints are written in full or not at all, and damage is noticed when they are read."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from timm_autoslim.recipes.lib import checkpoints
from timm_autoslim.recipes.lib.checkpoints import Checkpoints, Progress, restore


@pytest.fixture
def run(tmp_path):
    """A folder with checkpoints of two steps with momentum and a moving average."""
    model, optimizer, ema = make_training()
    saved = Checkpoints(tmp_path, 2)
    for total in (1, 2, 3):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        ema.update(model)
        saved.save(Progress(updates=total, total=total), {"seed": 1}, {"lr": 0.1}, model, optimizer, ema, None)
    return tmp_path


def make_training():
    model = torch.nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), ModelEmaV3(model, decay=0.5)


def test_the_last_checkpoints_stay_and_are_restored(run):
    saved = Checkpoints(run, 2)
    assert [path.name for path in saved.list_paths()] == ["update-00000002", "update-00000003"]
    newest = saved.find_newest()
    assert (newest.progress.total, newest.identity, newest.flags) == (3, {"seed": 1}, {"lr": 0.1})
    model, optimizer, ema = make_training()
    optimizer.param_groups[0]["lr"] = 0.01
    restore(newest.path, model, optimizer, ema, None)
    for module, name in ((model, checkpoints.MODEL), (ema.module, checkpoints.EMA)):
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in load_file(newest.path / name).items())
    assert optimizer.state[model.weight]["momentum_buffer"].any()
    assert optimizer.param_groups[0]["lr"] == 0.01  # the flags win over the checkpoint


def test_a_checkpoint_of_another_version_is_none(run):
    path = run / "checkpoints" / "update-00000003" / checkpoints.PROGRESS
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    assert Checkpoints(run, 2).find_newest().progress.total == 2
    assert not Checkpoints(run / "nowhere", 2).find_newest()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (checkpoints.OPTIMIZER, truncate, r"optimizer.pt has \d+ bytes, not \d+"),
        (checkpoints.MODEL, flip, "model.safetensors has changed since it was written"),
        (checkpoints.EMA, os.remove, "ema.safetensors is missing"),
        (checkpoints.PROGRESS, truncate, r"progress.json cannot be read \(.*\)"),
        (checkpoints.PROGRESS, os.remove, r"progress.json cannot be read \(.*No such file"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_put_aside(run, capsys, name, damage, text):
    damage(run / "checkpoints" / "update-00000003" / name)
    checkpoint = Checkpoints(run, 2).find_newest()
    progress = checkpoint.progress
    assert (checkpoint.path.name, progress.total, progress.updates) == ("update-00000002", 2, 2)
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"checkpoint \S*update-00000003 is damaged: {text}.* Going on from update-00000002\.", out)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-update-00000003", "update-00000002"]


def test_no_checkpoint_holds_pickled_code(run):
    for path in Checkpoints(run, 2).list_paths():
        assert sorted(file.name for file in path.iterdir()) == [
            checkpoints.EMA, checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.PROGRESS
        ]  # fmt: skip
        torch.load(path / checkpoints.OPTIMIZER, weights_only=True)
