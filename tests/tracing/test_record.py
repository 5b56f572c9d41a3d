"""The recorder: it sees every module, torch function and operator of a run on the meta device, and carries labels."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_autoslim.tracing.calls import wrap_attributes
from timm_autoslim.tracing.describe import Describer
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.origins import FromDimension
from timm_autoslim.tracing.record import LabelRecorder, Recorder
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


# -- labels -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.width = nn.Conv2d(3, 6, 1), 6

    def forward(self, x):
        x = self.conv(x)
        self.sizes = (x.shape[1], x.size(1), x.numel(), x.shape)
        return F.layer_norm(x.mean((2, 3)), (self.width,))


@pytest.fixture
def recorder():
    model, flow = Block().to("meta"), Flow()
    wrap_attributes(model)
    for parameter in model.parameters():
        flow.create_labels(parameter)
    recorder = LabelRecorder(model, flow, frozenset(), Describer(flow, model))
    recorder.start()
    recorder.run(meta(2, 3, 8, 8))
    return recorder


def test_sizes_know_the_dimension_that_they_are_of(recorder):
    channels, same, number, shape = recorder.model.sizes
    label = recorder.flow.get_labels(recorder.model.conv.weight)[0]
    for size in (channels, same, shape[1]):
        assert (int(size), type(size.origin)) == (6, FromDimension)
        assert recorder.flow.atoms.find(size.origin.vector).tolist() == recorder.flow.atoms.find(label).tolist()
    assert type(shape[0]) is int  # of the batch
    assert number.origin.proportional


def test_the_record_holds_operators_and_what_left_the_modules(recorder):
    record = recorder.get_record()
    assert record.training
    assert (record.operators[0].path, record.operators[0].name) == ("conv", "aten.convolution.default")
    assert [(leaving.path, leaving.shapes) for leaving in record.exits] == [("conv", ((2, 6, 8, 8),)), ("", ((2, 6),))]
    label = recorder.flow.get_labels(recorder.model.conv.weight)[0]
    (_, channels, _, _) = record.exits[0].labels[0]
    assert recorder.flow.atoms.find(channels).tolist() == recorder.flow.atoms.find(label).tolist()
    assert {id(recorder.model.conv.weight), id(recorder.model.conv.bias)} <= recorder.used_ids
    assert (recorder.last_path, recorder.last_shapes) == ("conv", [(2, 3, 8, 8)])


def test_another_run_starts_a_record_of_its_own(recorder):
    first = recorder.get_record()
    recorder.start()
    assert recorder.get_record().operators == ()
    recorder.model.eval()
    recorder.run(meta(1, 3, 8, 8))
    second = recorder.get_record()
    assert not second.training
    assert [o.name for o in second.operators] == [o.name for o in first.operators]


def test_the_shape_of_a_norm_binds_the_attribute_that_gives_it(recorder):
    (use,) = {use.path: use for use in recorder.flow.constraints.attributes}.values()
    assert (use.path, use.value, len(use.vector)) == ("width", 6, 6)


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
