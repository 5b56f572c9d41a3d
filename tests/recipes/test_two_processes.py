"""Two processes are one process on the joined batch: in a real launch, through train.py as it is."""

import csv

import pytest
import torch
from helpers.recipes import ROOT, launch_two, write_config
from helpers.two_processes import watch_train
from safetensors.torch import load_file

from timm_autoslim.recipes.lib.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

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
    alone = {name: watch_train(arguments(folder, f"{name}-alone", 16, *more)) for name, more in
             {"default": (), "clipped": CLIP}.items()}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # a run of one process that stops after its third update
        save = Checkpoints.save
        patch.setattr(Checkpoints, "save", lambda self, *state: (save(self, *state), stop()))
        with pytest.raises(KeyboardInterrupt):
            watch_train(arguments(folder, "regrouped", 16, "--recovery-interval", "3"))
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


@pytest.mark.parametrize(("name", "single"), [("two", "default"), ("accumulated", "clipped")])
def test_two_processes_are_one_on_the_joined_batch(notes, name, single):
    folder, alone, ranks, _ = notes
    for gradients in zip(alone[single]["gradients"], *(rank[name]["gradients"] for rank in ranks), strict=True):
        assert torch.equal(gradients[1], gradients[2])
        torch.testing.assert_close(gradients[1], gradients[0], atol=2e-6, rtol=1e-4)
    assert len(alone[single]["gradients"]) == UPDATES
    ours, expected = (load_file(folder / run / "supernet.safetensors") for run in (name, f"{single}-alone"))
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-4)


def test_gradients_are_exchanged_once_an_update(notes):
    _, alone, ranks, _ = notes
    for rank in ranks:
        assert rank["two"]["exchanges"] == [1] * UPDATES  # of four subnets
        assert rank["accumulated"]["exchanges"] == [0, 1] * UPDATES  # of two batches of four subnets
    assert not any(alone["default"]["exchanges"])


def test_gradients_are_clipped_once_an_update(notes):
    _, alone, ranks, _ = notes
    unclipped = [gradient.norm().item() for gradient in alone["default"]["gradients"]]
    clipped = [gradient.norm().item() for gradient in ranks[0]["accumulated"]["gradients"]]
    assert unclipped[0] > 0.5
    assert clipped[0] == pytest.approx(0.5, rel=1e-4)
    first = alone["clipped"]["gradients"][0]
    torch.testing.assert_close(ranks[0]["accumulated"]["gradients"][0], first, atol=1e-6, rtol=1e-4)


def test_processes_draw_the_same_widths_in_every_batch_of_an_update(notes):
    _, alone, ranks, _ = notes
    expected = alone["default"]["widths"]
    assert len({str(widths) for widths in expected}) == UPDATES
    for rank in ranks:
        assert rank["two"]["widths"] == expected
        assert rank["accumulated"]["widths"] == [widths for widths in expected for _ in range(2)]


def test_the_main_process_alone_shows_progress(notes):
    _, _, ranks, _ = notes
    assert set(ranks[0]["two"]["hidden"]) == {False}
    assert set(ranks[1]["two"]["hidden"]) == {True}


def test_a_run_goes_on_with_other_processes_for_the_same_images_an_update(notes):
    folder, _, ranks, printed = notes
    assert "Going on from update-00000003 (epoch 1)" in printed
    assert "Changed since: batch_size 8 (was 16), recovery_interval 0 (was 3), processes 2 (was 1)." in printed
    assert len(ranks[0]["regrouped"]["gradients"]) == UPDATES - 3
    ours, expected = (load_file(folder / run / "supernet.safetensors") for run in ("regrouped", "default-alone"))
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-4)


def test_losses_of_all_processes_are_recorded(notes):
    folder, *_ = notes
    rows = [next(csv.DictReader((folder / run / "summary.csv").open())) for run in ("two", "default-alone")]
    for name in ("train_widest_loss", "train_narrowest_loss", "eval_widest_loss", "eval_narrowest_top5"):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), rel=1e-3)
