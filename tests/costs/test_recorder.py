"""A recorder notes operators, their modules, and from when to when their memory lives."""

import pytest
import torch
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim.costs.recorder import (
    ATTENTION,
    TapeRecorder,
    TensorSpec,
    collect_numbers,
    describe,
    replace_numbers,
)


def record(model, example):
    recorder = TapeRecorder(model, example)
    out = recorder.run(example)
    recorder.finish()
    recorder.stack.release()
    return recorder, out


def test_operators_are_noted_with_their_modules_and_hooks_are_gone():
    with torch.device("meta"):
        model, images = TwoGroups().eval(), torch.zeros(2, 3, 8, 8)
    recorder, _ = record(model, images)
    convolutions = [(o.path, o.args[0].shape) for o in recorder.operators if o.name == "aten.convolution.default"]
    assert convolutions == [("stem", (2, 3, 8, 8)), ("inner", (2, 8, 8, 8)), ("outer", (2, 16, 8, 8))]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Steps(nn.Module):
    """Two results, of which the first is dropped after the second is there; a view and an in-place change of it."""

    def forward(self, x):
        y = x + 1  # 0
        z = y.view(-1) * 2  # 1, 2
        del y
        return z.add_(1)  # 3


def test_storages_live_from_the_operator_that_made_them_to_the_last_use():
    recorder, _ = record(Steps(), torch.zeros(4, 2, device="meta"))
    assert [o.name.split(".")[1] for o in recorder.operators] == ["add", "view", "mul", "add_"]
    assert [(s.numbers, s.born, s.last) for s in recorder.storages] == [((4, 4, 2), 0, 2), ((4, 8), 2, 3)]


class Attends(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x[..., :3])


def test_fused_attention_is_one_operator_and_its_scores_depend_on_the_widths():
    recorder, out = record(Attends(), torch.zeros(1, 2, 5, 4, device="meta"))
    assert [o.name for o in recorder.operators][-1] == ATTENTION
    assert out.shape == (1, 2, 5, 3)
    scores = [s for s in recorder.storages if s.unless_equal]
    assert {s.unless_equal for s in scores} == {(4, 3)}
    assert (8, 1, 2, 5, 5) in {s.numbers for s in scores}


@pytest.mark.parametrize("value", [5, True, "a", None, (1, (2, [3])), {"a": 1, "b": (2.5, 4)}])
def test_numbers_of_arguments_are_found_and_put_back(value):
    described = describe(value)
    numbers = list(collect_numbers(described))
    assert all(type(n) is int for n in numbers)
    assert replace_numbers(described, iter(numbers)) == described
    doubled = replace_numbers(described, iter([2 * n for n in numbers]))
    assert list(collect_numbers(doubled)) == [2 * n for n in numbers]


def test_tensors_are_described_by_type_shape_and_layout():
    plain, turned = torch.zeros(2, 3), torch.zeros(3, 2).t()
    assert describe(plain) == TensorSpec(torch.float32, (2, 3), (0, 1))
    assert describe(turned) == TensorSpec(torch.float32, (2, 3), (1, 0))
    assert describe(torch.zeros(3, 1).t()) == TensorSpec(torch.float32, (1, 3), (0, 1))
    assert list(collect_numbers(describe((plain, 7)))) == [2, 3, 7]
