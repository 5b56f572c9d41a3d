"""recipes/train.py: options that it refuses, and what its runs do."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.recipes import run_train
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from timm_autoslim.errors import ConfigError, OutputExistsError
from timm_autoslim.recipes import train
from timm_autoslim.recipes.lib.ownership import FolderInUseError, own_folder
from timm_autoslim.recipes.lib.sandwich import Sandwich
from timm_autoslim.recipes.lib.training import prepare


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--held-out 0", "--held-out 0.0: needed a share up to 1, or a number: the search needs such images"),
        ("--sandwich 1", "--sandwich 1: needed 2 or more: the widest and the narrowest are always trained"),
        ("--sandwich-delay 1", "--sandwich-delay 1.0: needed a share of the steps, from 0 to below 1"),
        ("--sandwich-delay -0.1", "--sandwich-delay -0.1: needed"),
        ("--distill-temperature 0", "--distill-temperature 0.0: needed a number above 0"),
        ("--distill-temperature nan", "--distill-temperature nan: needed"),
        ("--teacher resnet18 --teach-widest 1.5", "--teach-widest 1.5: needed a share from 0 to 1"),
        ("--teach-widest 0.5", "--teach-widest needs an outside --teacher"),
        ("--distill-teacher ema", "--distill-teacher ema needs the moving average: add --model-ema"),
        ("--distill-teacher ema --model-ema --teacher resnet18", "are two teachers: give one"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        run_train(tmp_path, "never", *flags.split())
    assert not (tmp_path / "never").exists()


def test_mixup_clipping_and_no_epochs(tmp_path):
    run_train(tmp_path, "mixed", "--mixup", "0.2", "--clip-grad", "1", "--channels-last", "--lr-base", "0.1",
              limit_train=96)  # fmt: skip
    assert (run_train(tmp_path, "untrained", epochs=0) / "supernet.safetensors").is_file()


@pytest.mark.slow
def test_bfloat16_trains_in_bfloat16(tmp_path):
    dtypes = []
    hook = register_module_forward_hook(
        lambda module, _, output: dtypes.append(output.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run = run_train(
            tmp_path, "bf16", "--amp", "--channels-last", "--recovery-interval", "1", img_size=32, limit_train=96
        )
    finally:
        hook.remove()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.bfloat16 in dtypes
    weights = load_file(run / "supernet.safetensors")
    assert all(value.dtype == torch.float32 for name, value in weights.items() if "num_batches" not in name)
    full = load_file(
        run_train(tmp_path, "fp32", "--channels-last", img_size=32, limit_train=96) / "supernet.safetensors"
    )
    assert any(not torch.equal(value, full[name]) for name, value in weights.items())


@pytest.mark.slow
def test_channels_last_reaches_weights_and_images(tmp_path, monkeypatch):
    layouts = []
    original = Sandwich.__call__

    def look(self, network, inputs, *others):
        layouts.append([x.is_contiguous(memory_format=torch.channels_last) for x in (inputs, *network.parameters())
                     if x.dim() == 4 and x.shape[1] > 1])  # fmt: skip
        return original(self, network, inputs, *others)

    monkeypatch.setattr(Sandwich, "__call__", look)
    color = {"in_chans": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    for flags, expected in ((["--channels-last"], True), ([], False)):
        run_train(tmp_path, str(expected), *flags, **color, limit_train=64)
        assert layouts[-1][0] == expected
        assert all(layouts[-1]) == expected


@pytest.mark.slow
def test_synchronised_norms_are_ordinary_ones_in_one_process(tmp_path):
    runs = [run_train(tmp_path, name, *flags) for name, flags in {"ordinary": (), "sync": ("--sync-bn",)}.items()]
    first, second = (load_file(folder / "supernet.safetensors") for folder in runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_the_moving_average_is_the_teacher_if_the_flags_say_so(tmp_path, monkeypatch):
    teachers, averages = [], []

    class Noting(Sandwich):
        def __init__(self, *args, teacher, **others):
            teachers.append(teacher)
            super().__init__(*args, teacher=teacher, **others)

    def note(*args):
        loop = prepare(*args)
        averages.append(loop.ema.module)
        return loop

    monkeypatch.setattr(train, "Sandwich", Noting)
    monkeypatch.setattr(train, "prepare", note)
    run_train(tmp_path, "widest", "--model-ema", limit_train=64)
    run_train(tmp_path, "ema", "--model-ema", "--distill-teacher", "ema", limit_train=64)
    assert teachers == [None, averages[1]]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tmp_path):
    runs = [run_train(tmp_path, name, "--seed", seed) for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))]
    first, again, other = ((folder / "supernet.safetensors").read_bytes() for folder in runs)
    assert first == again
    assert first != other


# -- what lies in the folder ------------------------------------------------------------------------------------------


def read_folder(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_of_two_trainings_in_a_folder_the_second_is_refused(tmp_path):
    run = run_train(tmp_path, "run", epochs=0)
    before = read_folder(run)
    with own_folder(run), pytest.raises(FolderInUseError, match="run is in use by"):
        run_train(tmp_path, "run", "--resume", "--seed", "5")
    assert read_folder(run) == before


@pytest.mark.slow
def test_a_finished_supernet_is_not_replaced(tmp_path, capsys):
    run = run_train(tmp_path, "run")
    before = read_folder(run)
    run_train(tmp_path, "run", "--resume", "--lr", "1")
    assert "supernet.safetensors: this training is finished" in capsys.readouterr().out
    (run / "search").mkdir()
    (run / "search" / "searched.json").touch()
    with pytest.raises(OutputExistsError, match="was searched with the supernet of 1 epochs: train for --epochs 2 in"):
        run_train(tmp_path, "run", "--resume", "--epochs", "2")
    for path in (run / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    with pytest.raises(OutputExistsError, match="holds a finished training, and no checkpoints to go on from"):
        run_train(tmp_path, "run", "--resume")
    assert read_folder(run).items() <= before.items() | {("searched.json", b"")}
    assert read_folder(run)["supernet.safetensors"] == before["supernet.safetensors"]


@pytest.mark.slow
def test_a_training_that_begins_again_draws_the_split_of_its_own_flags(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "prepare", stop)
        with pytest.raises(KeyboardInterrupt):
            run_train(tmp_path, "run")
    run = run_train(tmp_path, "run", "--resume", "--held-out", "64", epochs=0)
    split = json.loads((run / "held_out.json").read_text())
    assert (len(split["training"]), len(split["held_out"])) == (96, 64)
