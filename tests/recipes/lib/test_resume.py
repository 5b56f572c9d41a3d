"""A training that is killed, or whose checkpoint is damaged, ends bit for bit as one that was left alone."""

import csv
import os
import shutil
import signal

import pytest
import torch
import yaml
from helpers.recipes import run_train
from helpers.subprocesses import run_apart
from safetensors.torch import load_file, save_model
from timm.utils import ModelEmaV3

from timm_autoslim import files
from timm_autoslim.errors import ConfigError, OutputExistsError
from timm_autoslim.recipes import train
from timm_autoslim.recipes.lib import checkpoints, resume, run_folder, summary, trainer
from timm_autoslim.recipes.lib.validation import Validation

# Two epochs of four updates, the widest alone for the first three; a checkpoint after every update. Augmentation,
# dropout, mixup, warmup, momentum, the moving average and a tracker are all on.
OPTIONS = [
    *("--model-ema", "--distill-teacher", "ema", "--sandwich-delay", "0.4", "--sampler", "multiplier"),
    *("--recovery-interval", "1", "--mixup", "0.2", "--reprob", "0.3", "--aa", "rand-m5-n1", "--clip-grad", "1"),
    *("--log-tensorboard", "--log-interval", "1"),
]
CHANGES = {"epochs": 2, "warmup_epochs": 1, "val_widths": []}


def run_with_options(folder, name, *argv, **changes):
    settings = {**CHANGES, **changes}
    model = {"channels": [8, 8, 16, 16], "stem_width": 8, "drop_rate": 0.2, "drop_path_rate": 0.1}
    return run_train(folder, name, *OPTIONS, *argv, **settings, model_kwargs=model)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that was left alone."""
    return run_with_options(tmp_path_factory.mktemp("uninterrupted"), "run")


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def call_nth(count, function, instead):
    """Call `function`, but the `count`-th time `instead`."""
    left = [count]

    def call(*args, **kwargs):
        left[0] -= 1
        return (instead if not left[0] else function)(*args, **kwargs)

    return call


def save_half(model, path):
    """As a process that dies in the middle of writing."""
    save_model(model, path)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    die()


def write_half_result(path, model):
    run_folder.save_model = save_half  # of this process only
    run_folder.write_weights(path, model)


def write_half_row(*args, **kwargs):
    with args[3].open("a") as file:
        file.write("7,2.3,")
    die()


def remove_half(path, **_):
    next(path.iterdir()).unlink()
    die()


def die_before_rename(path):
    if path.name == "part":
        die()
    original_sync(path)


def die_before_one_goes(path):
    if path.name == "checkpoints" and len([*path.glob("update-*")]) > 2:
        die()
    original_sync(path)


original_sync = files.sync_to_disk
# Where the process is killed, in turn; each time it goes on from what the one before left.
KILLS = {
    "in the first update": lambda: (ModelEmaV3, "update", die),
    "before the first checkpoint": lambda: (trainer, "check_weights", die),
    "in the first checkpoint": lambda: (run_folder, "save_model", save_half),
    "in the fourth update": lambda: (ModelEmaV3, "update", call_nth(4, ModelEmaV3.update, die)),
    "in the moving average": lambda: (run_folder, "save_model", call_nth(2, save_model, save_half)),
    "in the summary": lambda: (summary, "update_summary", write_half_row),
    "in the validation": lambda: (Validation, "__call__", die),
    "before the rename": lambda: (files, "sync_to_disk", die_before_rename),
    "before the old one goes": lambda: (files, "sync_to_disk", die_before_one_goes),
    "while the old one goes": lambda: (checkpoints.shutil, "rmtree", call_nth(3, shutil.rmtree, remove_half)),
    "after the last epoch": lambda: (train, "write_weights", write_half_result),
}


def train_to_death(folder, point):
    setattr(*KILLS[point]())
    run_with_options(folder, "run", "--resume")


def check_same_summaries(first, second):
    rows = [list(csv.DictReader((folder / "summary.csv").open())) for folder in (first, second)]
    for row in (*rows[0], *rows[1]):
        assert float(row.pop("train_images_per_s")) > 0
        assert float(row.pop("eval_images_per_s")) > 0
    assert rows[0] == rows[1]
    return rows[0]


def check_same_files(first, second):
    """Weights, moving average, optimizer and progress of the checkpoints, and the result."""
    assert (first / "supernet.safetensors").read_bytes() == (second / "supernet.safetensors").read_bytes()
    for name in ("update-00000007", "update-00000008"):
        for file in (checkpoints.MODEL, checkpoints.EMA):
            tensors = [load_file(folder / "checkpoints" / name / file) for folder in (first, second)]
            assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
        path = f"checkpoints/{name}/{checkpoints.OPTIMIZER}"
        states = [torch.load(folder / path, weights_only=True)["optimizer"] for folder in (first, second)]
        assert states[0]["param_groups"] == states[1]["param_groups"]
        for key, state in states[0]["state"].items():
            assert torch.equal(state["momentum_buffer"], states[1]["state"][key]["momentum_buffer"])


def read_curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "timm-autoslim"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.endswith("images_per_s")]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_left_alone(uninterrupted, tmp_path):
    reached = []
    for point in KILLS:
        done = run_apart(train_to_death, tmp_path, point, cwd=tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "run" / "supernet.safetensors").exists()
        saved = checkpoints.Checkpoints(tmp_path / "run", 2)
        reached.append(saved.find_newest().progress.total if saved.list_paths() else 0)
    assert reached == [0, 0, 0, 3, 3, 3, 3, 3, 4, 5, 8]
    run = run_with_options(tmp_path, "run", "--resume")
    check_same_files(uninterrupted, run)
    rows = check_same_summaries(uninterrupted, run)
    assert float(rows[0]["train_narrowest_loss"]) > 0
    expected = read_curves(uninterrupted)
    assert [step for step, _ in expected["train/widest_loss"]] == list(range(1, 9))
    assert read_curves(run) == expected
    assert not list((run / "checkpoints").glob("old-*"))
    assert not (run / "checkpoints" / "part").exists()


def test_nothing_is_resumed_without_being_asked_to(uninterrupted):
    with pytest.raises(OutputExistsError, match=r"holds a training \(supernet.safetensors\): --resume it"):
        run_with_options(uninterrupted.parent, "run")


# --------------------------------------------------------------------------------------------------------- damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def test_a_run_goes_on_from_before_a_damaged_checkpoint_as_if_nothing_had_been(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "supernet.safetensors").unlink()
    truncate(run / "checkpoints" / "update-00000008" / checkpoints.MODEL)
    run_with_options(tmp_path, "run", "--resume")
    check_same_files(uninterrupted, run)
    check_same_summaries(uninterrupted, run)


def test_a_run_whose_checkpoints_are_all_damaged_says_so(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for path in checkpoints.Checkpoints(run, 2).list_paths():
        truncate(path / checkpoints.MODEL)
    message = r"update-00000008 is damaged: .*update-00000007 is damaged: .* No other checkpoint is left in .*: start"
    with pytest.raises(checkpoints.CheckpointError, match=message):
        run_with_options(tmp_path, "run", "--resume")
    assert len(checkpoints.Checkpoints(run, 2).list_paths()) == 2  # nothing was put aside


# ------------------------------------------------------------------------------------------------ what may change


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--min-width 0.5", r"widths of conv1\.0 \(and of 10 more\) \[1, 2, .*\], and now it is \[3, 4"),
        ("--pretrained", "pretrained False, and now it is True: give --no-pretrained as before"),
        (
            "--initial-checkpoint gone.pth",
            "initial_checkpoint None, and now it is gone.pth: leave out --initial-checkpoint",
        ),
        ("--zero-init-last", "zero_init_last False, and now it is True: give --no-zero-init-last"),
        ("--order l1", "order None, and now it is l1: leave out --order"),
        ("--seed 3", "seed 42, and now it is 3: give --seed 42 as before, or start another --experiment"),
        ("--grad-accum-steps 2", r"images_per_update 32, and now it is 64: .* must stay 32"),
    ],
)
def test_what_cannot_change_in_the_middle_is_refused(uninterrupted, tmp_path, flags, message):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    before = (run / "args.yaml").read_text()
    with pytest.raises(ConfigError, match=f"--resume: this run was begun with .*{message}"):
        run_with_options(tmp_path, "run", "--resume", *flags.split())
    assert (run / "args.yaml").read_text() == before


def test_what_a_run_must_keep_is_in_its_checkpoints(uninterrupted):
    identity = checkpoints.Checkpoints(uninterrupted, 2).find_newest().identity
    names = {"model", "num_classes", "in_chans", "opt", "model_ema", "limit_train", "held_out", "training_images"}
    names |= {"pretrained", "initial_checkpoint", "zero_init_last", "order", "order_images"}
    assert names | {"widths", "seed", "images_per_update", "val_widths"} == set(identity)
    for name in names:
        with pytest.raises(ConfigError, match=f"this run was begun with {name} .*, and now it is other: give the same"):
            resume.check_identity(identity, {**identity, name: "other"})
    resume.check_identity(identity, identity)
    for value, text in ((300.0, "give --limit-train 300 as before"), (None, "leave out --limit-train as before")):
        with pytest.raises(ConfigError, match=f"and now it is 1.*: {text}, or start another --experiment"):
            resume.check_identity({"limit_train": value}, {"limit_train": 1.0}, {"limit_train"})


def test_what_may_change_is_told(uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    run_with_options(
        tmp_path, "run", "--resume", "--lr", "0.01", "--log-interval", "3", "--subnet-sizes", "16", "12", epochs=3
    )
    out = capsys.readouterr().out
    assert "Going on from update-00000008 (epoch 3)" in out
    assert (
        "Changed since: epochs 3 (was 2), lr 0.01 (was 0.05), subnet_sizes [16, 12] (was []). The result is not that of"
        in out
    )
    assert "epoch 3/3" in out


def test_other_images_an_update_are_refused(tmp_path):
    run = run_train(tmp_path, "run")
    before = yaml.safe_load((run / "args.yaml").read_text())
    with pytest.raises(ConfigError, match=r"begun with images_per_update 32, .* 16: --batch-size x processes x --grad"):
        run_train(tmp_path, "run", "--resume", "-b", "16")
    assert yaml.safe_load((run / "args.yaml").read_text()) == before
    run_train(tmp_path, "run", "--resume", "-b", "16", "--grad-accum-steps", "2")  # finished: nothing is left to do
