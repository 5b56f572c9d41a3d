"""What `execute` returns is as on a device with data, and it raises where that would."""

import pytest
import torch
from helpers.operators import aten, tensor

from timm_autoslim.tracing.ops.meta_kernels import execute
from timm_autoslim.tracing.ops.schema import tensors_in_lists

LAST = torch.empty(2, 6, 5, 5, device="meta").to(memory_format=torch.channels_last)
PARAMETERS = (tensor(6), tensor(6), tensor(6), tensor(6))
ONE_GROUP = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups
CASES = {
    "gelu": (aten.gelu.default, (LAST,), {}),
    "gelu of another kind": (aten.gelu.default, (LAST,), {"approximate": "tanh"}),
    "_softmax": (aten._softmax.default, (tensor(2, 6), 1, False), {}),
    "_softmax of halves": (aten._softmax.default, (tensor(2, 6).half(), 1, False), {}),
    "mul by a number": (aten.mul.Scalar, (LAST, 2.0), {}),
    "add": (aten.add.Tensor, (LAST, tensor(1, 6, 1, 1)), {}),
    "add with a scale": (aten.add.Tensor, (LAST, tensor(1, 6, 1, 1)), {"alpha": 2}),
    "add of another type": (aten.add.Tensor, (tensor(2, 6).half(), tensor(2, 6)), {}),
    "add of a wider one": (aten.add.Tensor, (tensor(6), tensor(2, 6)), {}),
    "batch norm in training": (aten.native_batch_norm.default, (LAST, *PARAMETERS, True, 0.1, 1e-5), {}),
    "batch norm": (aten.native_batch_norm.default, (tensor(2, 6, 5, 5), *PARAMETERS, False, 0.1, 1e-5), {}),
    "layer norm": (aten.native_layer_norm.default, (tensor(2, 5, 6), [6], tensor(6), tensor(6), 1e-5), {}),
    "layer norm without weights": (aten.native_layer_norm.default, (tensor(2, 5, 6), [5, 6], None, None, 1e-5), {}),
    "addmm": (aten.addmm.default, (tensor(8), tensor(2, 6), tensor(6, 8)), {}),
    "addmm with a scale": (aten.addmm.default, (tensor(8), tensor(2, 6), tensor(6, 8)), {"beta": 2, "alpha": 3}),
    "addmm of a matrix": (aten.addmm.default, (tensor(2, 8), tensor(2, 6), tensor(6, 8)), {}),
    "resized": (aten.upsample_bilinear2d.default, (LAST, [10, 10], False), {}),
    "resized by a scale": (aten.upsample_bilinear2d.default, (tensor(2, 6, 5, 5), [10, 10], False, 2.0, 2.0), {}),
    "convolution": (aten.convolution.default, (tensor(2, 6, 5, 5), tensor(8, 6, 3, 3), tensor(8), *ONE_GROUP), {}),
    "convolution without a bias": (
        aten.convolution.default, (tensor(2, 6, 5, 5), tensor(8, 6, 3, 3), None, *ONE_GROUP), {}
    ),
    "a factory": (aten.zeros.default, ([2, 6],), {"device": "meta"}),
    "integers": (aten.add.Tensor, (tensor(2).long(), 1), {}),
    "to another type": (aten._to_copy.default, (LAST,), {"dtype": torch.float16}),
}  # fmt: skip


def describe(results):
    return [(t.shape, t.dtype, t.stride()) for t in tensors_in_lists(results)]


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_a_device_with_data(name):
    operator, args, kwargs = CASES[name]
    on_cpu = [torch.zeros_like(a, device="cpu") if isinstance(a, torch.Tensor) else a for a in args]
    expected = operator(*on_cpu, **{k: "cpu" if k == "device" else v for k, v in kwargs.items()})
    assert describe(execute(operator, args, kwargs)) == describe(expected)


@pytest.mark.parametrize(
    ("weight", "transposed", "groups"),
    [(tensor(8, 6, 1, 1), False, 1), (tensor(8, 3, 1, 1), False, 2), (tensor(6, 8, 1, 1), True, 1),
     (tensor(6, 4, 1, 1), True, 2)],
)  # fmt: skip
def test_the_bias_of_a_convolution_must_be_as_long_as_its_output(weight, transposed, groups):
    rest = ([1, 1], [0, 0], [1, 1], transposed, [0, 0], groups)
    assert execute(aten.convolution.default, (LAST, weight, tensor(8), *rest), {}).shape == (2, 8, 5, 5)
    with pytest.raises(RuntimeError, match="a convolution to 8 channels has a bias of length 7"):
        execute(aten.convolution.default, (LAST, weight, tensor(7), *rest), {})


def test_shapes_that_do_not_fit_raise():
    with pytest.raises(RuntimeError, match="batch norm over 6 channels has a tensor of length 5"):
        execute(aten.native_batch_norm.default, (LAST, tensor(5), *PARAMETERS[1:], False, 0.1, 1e-5), {})
    with pytest.raises(RuntimeError, match="normalized_shape"):
        execute(aten.native_layer_norm.default, (tensor(2, 5, 6), [5], None, None, 1e-5), {})
    with pytest.raises(RuntimeError, match="same reduction dim"):
        execute(aten.addmm.default, (tensor(8), tensor(2, 5), tensor(6, 8)), {})
    with pytest.raises(RuntimeError, match="Attempting to broadcast a dimension of length 5"):
        execute(aten.add.Tensor, (tensor(2, 6), tensor(2, 5)), {})
