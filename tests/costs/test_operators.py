"""Single operators: their text, their arguments, and those that cannot be measured."""

from dataclasses import replace

import pytest
import torch

from timm_autoslim import RUNTIMES
from timm_autoslim.costs.operators import (
    count_bytes,
    format_operator,
    is_heavy,
    is_view,
    make_arguments,
    measure_operator,
)
from timm_autoslim.costs.recorder import ATTENTION, Operator, TensorSpec
from timm_autoslim.errors import LatencyError

CPU = torch.device("cpu")


def test_an_operator_that_cannot_be_measured_is_named():
    broken = Operator("aten.mm.default", "head", (TensorSpec(torch.float32, (2, 3), (0, 1)),) * 2, {})
    with pytest.raises(LatencyError, match=r"head: aten\.mm\.default cannot be measured by itself \(RuntimeError"):
        measure_operator(broken, RUNTIMES["eager"], CPU, 1)


def test_equal_texts_are_equal_work():
    spec = TensorSpec(torch.float32, (2, 3), (0, 1))
    operators = [
        Operator("aten.mm.default", "a", (spec, spec), {}),
        Operator("aten.mm.default", "b", (spec, spec), {}),
        Operator("aten.mm.default", "a", (spec, replace(spec, order=(1, 0))), {}),
        Operator("aten.sum.default", "a", (spec,), {"dtype": torch.float64}),
    ]
    texts = [format_operator(operator) for operator in operators]
    assert texts[0] == texts[1] == "aten.mm.default(float32[2,3],float32[2,3])"
    assert texts[2] == "aten.mm.default(float32[2,3],float32[2,3]/1,0)"
    assert texts[3] == "aten.sum.default(float32[2,3]),dtype=torch.float64"


def test_arguments_have_the_shapes_and_layouts_of_their_specifications():
    transposed = TensorSpec(torch.float32, (2, 3), (1, 0))
    tensor, number, parts = make_arguments((transposed, 5, (TensorSpec(torch.bool, (4,), (0,)),)), CPU)
    assert (tensor.shape, tensor.stride(), number) == ((2, 3), (1, 2), 5)
    assert parts[0].dtype == torch.bool
    assert count_bytes((transposed, 5, (transposed,))) == 48


def test_views_and_heavy_operators_are_told_apart():
    assert is_view("aten.view.default")
    assert is_view("aten.t.default")
    assert not any(is_view(name) for name in ("aten.relu.default", "aten.add_.Tensor", ATTENTION, "lstm"))
    heavy = [name for name in ("aten.convolution.default", ATTENTION, "lstm", "aten.relu.default", "aten.sum.default")
             if is_heavy(Operator(name, "", (), {}))]  # fmt: skip
    assert heavy == ["aten.convolution.default", ATTENTION, "lstm"]
