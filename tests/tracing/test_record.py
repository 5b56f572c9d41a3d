"""The recorder: it sees every module, torch function and operator of a run on the meta device, and carries labels."""

import gc
import weakref

import pytest
import torch
from torch import nn

from timm_autoslim.tracing.record import Recorder
from timm_autoslim.utils.meta import copy_to_meta


def meta(*shape):
    return torch.empty(shape, device="meta")


class Notes(Recorder):
    """Notes all that it sees, with the module that runs."""

    def __init__(self, model):
        self.notes = []
        super().__init__(model)

    def note(self, kind, name):
        self.notes.append((self.stack.path, kind, name))

    def enter(self, path, module, args, kwargs):
        self.note("enter", type(module).__name__)

    def leave(self, path, module, out):
        self.notes.append((path, "leave", type(module).__name__))

    def run_function(self, func, args, kwargs):
        self.note("function", func.__name__)
        return super().run_function(func, args, kwargs)

    def run_operator(self, func, args, kwargs):
        self.note("operator", str(func))
        return super().run_operator(func, args, kwargs)


def test_every_module_function_and_operator_of_a_run_is_seen_in_its_order():
    recorder = Notes(nn.Sequential(nn.ReLU(), nn.Flatten()).to("meta"))
    assert recorder.run(meta(2, 3, 4)).shape == (2, 12)
    assert recorder.notes == [
        ("", "enter", "Sequential"),
        ("0", "enter", "ReLU"),
        ("0", "function", "relu"),
        ("0", "operator", "aten.relu.default"),
        ("0", "leave", "ReLU"),
        ("1", "enter", "Flatten"),
        ("1", "function", "flatten"),
        ("1", "operator", "aten.view.default"),
        ("1", "leave", "Flatten"),
        ("", "leave", "Sequential"),
    ]
    assert recorder.stack.idle


def test_outside_of_a_run_nothing_is_seen():
    model = nn.ReLU()
    recorder = Notes(model)
    torch.relu(meta(2))
    assert recorder.notes == []


def test_a_run_takes_the_same_random_path_each_time_and_leaves_the_generator_alone():
    class Dice(nn.Module):
        def forward(self, x):
            return x.view(-1) if torch.rand((), device="cpu") < 0.5 else x

    before = torch.get_rng_state()
    paths = [Recorder(Dice()).run(meta(2, 3)).dim() for _ in range(8)]
    assert len(set(paths)) == 1
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_taken_as_one(kind):
    recorder = Notes(kind(5, 4, batch_first=True, bidirectional=True).to("meta"))
    out, _ = recorder.run(meta(2, 7, 5))
    assert out.shape == (2, 7, 8)
    assert not [name for _, what, name in recorder.notes if what == "operator" and "mm" in name]


def test_what_the_code_passes_is_noted_by_place():
    class Block(nn.Module):
        def forward(self, x):
            for power in (2, 3):
                x = x.pow(power)
            return torch.add(x, x, alpha=4)

    recorder = Recorder(Block())
    recorder.run(meta(2))
    assert sorted(map(tuple, recorder.calls.values()), key=len) == [((None, None, "alpha", 4),), ((None, 2), (None, 3))]


def test_a_recorder_that_is_released_keeps_no_model_alive():
    model = copy_to_meta(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    recorder, alive = Recorder(model), weakref.ref(model)
    recorder.run(torch.empty(2, 4, device="meta"))
    gc.disable()
    try:
        recorder.release()
        del recorder, model
        assert alive() is None
    finally:
        gc.enable()
