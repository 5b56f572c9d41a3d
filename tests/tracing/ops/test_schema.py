"""An operator's arguments by name: bound once to its schema, defaults filled in."""

import dataclasses

import pytest
import torch
from helpers.operators import aten, tensor

from timm_autoslim.errors import TraceError
from timm_autoslim.tracing.ops.schema import bind, tensors_in_lists


def test_arguments_have_the_schema_s_names_and_order():
    x = tensor(2, 8)
    op = bind(aten.slice.Tensor, (x, 1, 2), {}, None)
    assert op.operator == "aten.slice"
    assert op.name == "slice"
    assert list(op.arguments) == ["self", "dim", "start", "end", "step"]
    assert op["self"] is x
    assert (op["dim"], op["start"], op["end"], op["step"]) == (1, 2, None, 1)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((4, 1), {}), ((4,), {"dim": 1}), ((), {"dim": 1, "split_size": 4})], ids=str
)
def test_position_and_name_are_the_same(args, kwargs):
    x = tensor(2, 8)
    assert bind(aten.split.Tensor, (x, *args), kwargs, None) == bind(aten.split.Tensor, (x, 4, 1), {}, None)


def test_defaults_are_filled_in_and_cannot_be_changed_through_a_call():
    op = bind(aten.avg_pool2d.default, (tensor(2, 8, 4, 4), [2, 2]), {}, None)
    assert (op["stride"], op["padding"], op["ceil_mode"], op["divisor_override"]) == ((), (0, 0), False, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        op.out = 1


def test_tensors_stand_in_the_order_of_the_schema():
    x, y, z = tensor(2), tensor(2), tensor(2)
    op = bind(aten.addcmul.default, (), {"tensor2": z, "value": 2, "tensor1": y, "self": x}, None)
    assert all(a is b for a, b in zip(op.tensors, (x, y, z), strict=True))
    assert len(bind(aten.cat.default, ([x, y],), {}, None).tensors) == 2
    assert len(bind(aten.index.Tensor, (x, [None, y]), {}, None).tensors) == 2


def test_an_argument_that_the_schema_does_not_have_is_told():
    op = bind(aten.mm.default, (tensor(2, 3), tensor(3, 4)), {}, None)
    with pytest.raises(
        TraceError,
        match=r"the rule of aten\.mm: got argument 'other'; needed: one of \['self', 'mat2'\]",
    ):
        op["other"]
    assert op.get("other") is None
    assert op.get("other", 1) == 1


def test_operators_of_others_are_bound_too():
    boxes, scores = tensor(4, 4), tensor(4)
    op = bind(torch.ops.torchvision.nms.default, (boxes, scores, 0.5), {}, None)
    assert (op.operator, op.name, op["iou_threshold"]) == ("torchvision.nms", "torchvision.nms", 0.5)


def test_tensors_are_looked_for_in_tuples_and_lists_only():
    x, y = tensor(1), tensor(2)
    assert [t.shape for t in tensors_in_lists((x, [y, (x, 3)], {"key": y}, None))] == [(1,), (2,), (1,)]
    assert tensors_in_lists(x)[0] is x
