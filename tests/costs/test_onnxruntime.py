"""Single operators in ONNX Runtime are those of torch."""

from dataclasses import replace

import pytest
import torch

from timm_autoslim.costs.onnxruntime import make_graph, time_operator
from timm_autoslim.costs.operators import find_function
from timm_autoslim.costs.recorder import Operator, TensorSpec


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten.convolution.default", ((2, 16, 9, 9), (24, 8, 3, 3), (24,), (2, 2), (1, 1), (1, 1), False, (0, 0), 2)),
        ("aten.convolution.default", ((2, 16, 9, 9), (16, 24, 2, 2), None, (2, 2), (0, 0), (1, 1), True, (1, 1), 1)),
        ("aten.convolution.default", ((2, 16, 9), (8, 16, 3), None, (1,), (1,), (1,), False, (0,), 1)),
        ("aten.addmm.default", ((8,), (4, 16), (16, 8))),
        ("aten.mm.default", ((4, 16), (16, 8))),
        ("aten.bmm.default", ((3, 4, 16), (3, 16, 8))),
        ("scaled_dot_product_attention", ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6))),
    ],
)
def test_onnxruntime_runs_single_operators(name, args):
    """Shapes of tensors come first, as tuples in the place of specifications."""
    onnxruntime = pytest.importorskip("onnxruntime")
    tensors = 3 if name != "aten.mm.default" and name != "aten.bmm.default" else 2
    specs = [a and TensorSpec(torch.float32, a, tuple(range(len(a)))) for a in args[:tensors]]
    operator = Operator(name, "", (*specs, *args[tensors:]), {})
    assert 0 < time_operator(operator, 1) < 1000
    half = [s and replace(s, dtype=torch.bfloat16) for s in specs]
    assert time_operator(replace(operator, args=(*half, *args[tensors:])), 1) is None
    # what runs is the operator: its result has the shape that torch's has
    graph = make_graph(operator)
    made = [s and torch.ones(s.shape) for s in specs]
    wanted = find_function(name)(*made, *args[tensors:]).shape
    session = onnxruntime.InferenceSession(graph.model, providers=["CPUExecutionProvider"])
    assert session.run(None, graph.feed)[0].shape == wanted
