"""Two processes are one process on the joined batch: in a real launch, through train.py as it is."""

import csv
import os
import platform
from pathlib import Path

import checkpoints
import loop
import processes
import pytest
import torch
import yaml
from helpers.recipes import ROOT, launch_two, parse, trained, write_config
from helpers.subprocesses import run_apart
from helpers.two_processes import watched
from safetensors.torch import load_file

from timm_autoslim.errors import ConfigError

# Without BatchNorm, whose statistics are of one process's batch. 128 images, 16 an update: 8 updates.
# Augmentation is on: what an image gets depends on the seed, the epoch and the image alone.
LAYERNORM = {"model": "test_convnext", "model_kwargs": {"depths": [1] * 4, "dims": [8, 8, 8, 16]}, "img_size": 32,
             "lr": 0.002, "reprob": 0.5}  # fmt: skip
UPDATES = 8


def arguments(folder, name, batch, *more):
    config = write_config(folder, **LAYERNORM)
    return ["-c", config, "--output", str(folder), "--experiment", name, "-b", str(batch), *more]


CLIP = ("--clip-grad", "0.5", "--model-ema", "--distill-teacher", "ema")
RUNS = {"two": (8,), "accumulated": (4, "--grad-accum-steps", "2", *CLIP), "regrouped": (8, "--resume")}


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """What one process noted on the joined batch, and what two did."""
    folder = tmp_path_factory.mktemp("processes")
    alone = {name: watched(arguments(folder, f"{name}-alone", 16, *more)) for name, more in
             {"plain": (), "clipped": CLIP}.items()}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # a run of one process that stops after its third update
        save = checkpoints.Checkpoints.save
        patch.setattr(checkpoints.Checkpoints, "save", lambda self, *given: (save(self, *given), stop()))
        with pytest.raises(KeyboardInterrupt):
            watched(arguments(folder, "regrouped", 16, "--recovery-interval", "3"))
    command = []
    for name, (batch, *more) in RUNS.items():
        command += [name, *arguments(folder, name, batch, *more), "--"]
    done = launch_two(str(ROOT / "tests" / "helpers" / "two_processes.py"), str(folder), *command)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [rank["processes"] for rank in ranks] == [2, 2]
    return folder, alone, [rank["runs"] for rank in ranks], done.stdout


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "twin"), [("two", "plain"), ("accumulated", "clipped")])
def test_two_processes_are_one_on_the_joined_batch(notes, name, twin):
    folder, alone, ranks, _ = notes
    for gradients in zip(alone[twin]["gradients"], *(rank[name]["gradients"] for rank in ranks), strict=True):
        assert torch.equal(gradients[1], gradients[2])
        torch.testing.assert_close(gradients[1], gradients[0], atol=2e-6, rtol=1e-4)
    assert len(alone[twin]["gradients"]) == UPDATES
    ours, expected = (load_file(folder / run / "supernet.safetensors") for run in (name, f"{twin}-alone"))
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-4)


def test_gradients_are_exchanged_once_an_update(notes):
    _, alone, ranks, _ = notes
    for rank in ranks:
        assert rank["two"]["exchanges"] == [1] * UPDATES  # of four subnets
        assert rank["accumulated"]["exchanges"] == [0, 1] * UPDATES  # of two batches of four subnets
    assert not any(alone["plain"]["exchanges"])


def test_gradients_are_clipped_once_when_they_are_whole(notes):
    _, alone, ranks, _ = notes
    whole = [gradient.norm().item() for gradient in alone["plain"]["gradients"]]
    clipped = [gradient.norm().item() for gradient in ranks[0]["accumulated"]["gradients"]]
    assert whole[0] > 0.5
    assert clipped[0] == pytest.approx(0.5, rel=1e-4)
    first = alone["clipped"]["gradients"][0]
    torch.testing.assert_close(ranks[0]["accumulated"]["gradients"][0], first, atol=1e-6, rtol=1e-4)


def test_processes_draw_the_same_widths_in_every_batch_of_an_update(notes):
    _, alone, ranks, _ = notes
    expected = alone["plain"]["widths"]
    assert len({str(widths) for widths in expected}) == UPDATES
    for rank in ranks:
        assert rank["two"]["widths"] == expected
        assert rank["accumulated"]["widths"] == [widths for widths in expected for _ in range(2)]


def test_the_main_process_alone_shows_progress(notes):
    _, _, ranks, _ = notes
    assert set(ranks[0]["two"]["hidden"]) == {False}
    assert set(ranks[1]["two"]["hidden"]) == {True}


def test_a_run_goes_on_with_other_processes_for_the_same_images_an_update(notes):
    folder, _, ranks, said = notes
    assert "Going on from update-00000003 (epoch 1)" in said
    assert "Changed since: batch_size 8 (was 16), recovery_interval 0 (was 3), processes 2 (was 1)." in said
    assert len(ranks[0]["regrouped"]["gradients"]) == UPDATES - 3
    ours, expected = (load_file(folder / run / "supernet.safetensors") for run in ("regrouped", "plain-alone"))
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-4)


def test_losses_of_all_processes_are_recorded(notes):
    folder, *_ = notes
    rows = [next(csv.DictReader((folder / run / "summary.csv").open())) for run in ("two", "plain-alone")]
    for name in ("train_widest_loss", "train_narrowest_loss", "eval_widest_loss", "eval_narrowest_top5"):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), rel=1e-3)


# ------------------------------------------------------------------------------------------------ memory


def resident():
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def free_a_block(folder, variables):
    """Set a recipe up, and print how much of a freed block of 256 MiB is still resident."""
    for name in processes.MALLOC_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)
    processes.make_accelerator(parse("train", write_config(folder)))
    before = resident()
    block = torch.ones(64 * 2**20)
    assert resident() - before > 250
    del block
    print(resident() - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
@pytest.mark.parametrize(
    ("variables", "kept"),
    [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}, False)],
    ids=["by default", "malloc is set", "malloc is tuned"],
)
def test_freed_memory_is_kept_unless_the_user_has_set_malloc(tmp_path, variables, kept):
    done = run_apart(free_a_block, tmp_path, variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 200) is kept, done.stdout


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda name: pytest.fail("no C library may be touched"))
    assert not processes.keep_memory()


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", sorted(processes.REFUSED))
def test_engines_that_cannot_train_a_supernet_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(processes.REFUSED[name], "true")
    with pytest.raises(ConfigError, match=f"{name} cannot train a supernet"):
        processes.make_accelerator(parse("train", write_config(tmp_path)))


def test_accumulation_by_the_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ConfigError, match=r"--gradient_accumulation_steps 4: leave it out, .* --grad-accum-steps"):
        processes.make_accelerator(parse("train", write_config(tmp_path)))


def test_other_images_an_update_are_refused(tmp_path):
    run = trained(tmp_path, "run")
    kept = yaml.safe_load((run / "args.yaml").read_text())
    with pytest.raises(ConfigError, match=r"begun with images_per_update 32, .* 16: --batch-size x processes x --grad"):
        trained(tmp_path, "run", "--resume", "-b", "16")
    assert yaml.safe_load((run / "args.yaml").read_text()) == kept
    trained(tmp_path, "run", "--resume", "-b", "16", "--grad-accum-steps", "2")  # finished: nothing is left to do


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--grad-accum-steps 0", "--grad-accum-steps 0: needed 1 or more"),
        ("--epochs -1", "--epochs -1: needed 0 or more"),
        ("--recovery-interval -1", "--recovery-interval -1: needed 0"),
        ("--checkpoint-hist 0", "--checkpoint-hist 0: needed 1"),
        ("-b 0", "--batch-size 0: needed 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, "never", *flags.split())
    assert not (tmp_path / "never" / "args.yaml").exists()


def test_learning_rates_follow_the_images_of_an_update(tmp_path):
    config = write_config(tmp_path, lr=None)
    for flags, expected in {
        "--lr 0.3": 0.3, "--lr-base 0.1": 0.2, "--lr-base 0.1 --lr-base-size 128": 0.4,
        "--lr-base 0.1 --lr-base-scale sqrt": 0.1 * 2**0.5, "--opt adamw": 0.1 * 2**0.5, "--opt adamw --lr 1e-3": 1e-3,
    }.items():  # fmt: skip
        assert loop.learning_rate(parse("train", config, *flags.split()), 512) == pytest.approx(expected)
