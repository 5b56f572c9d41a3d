"""The recorder of a trace: it carries labels, and keeps what operators and modules had of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_autoslim.tracing.calls import wrap_attributes
from timm_autoslim.tracing.describe import Describer
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.label_recorder import LabelRecorder
from timm_autoslim.tracing.origins import FromDimension


def meta(*shape):
    return torch.empty(shape, device="meta")


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
    recorder = LabelRecorder(model, flow, {}, Describer(flow, model))
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
