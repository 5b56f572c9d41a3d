"""Inputs of measurements: on the device, of the type, and with ordinary numbers."""

import torch

from timm_autoslim.costs.inputs import make_tensor, place_inputs

CPU = torch.device("cpu")


def test_made_up_numbers_are_ordinary_and_move_no_generator():
    before = torch.get_rng_state()
    numbers = make_tensor((100,), torch.float32, CPU)
    assert 0.5 <= numbers.min() < numbers.max() <= 1.5
    assert torch.equal(numbers, make_tensor((100,), torch.float32, CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert make_tensor((3,), torch.bool, CPU).all()
    assert not make_tensor((3,), torch.int64, CPU).any()


def test_inputs_of_any_form_are_placed():
    image, index = torch.zeros(1, 3, 8, 8), torch.tensor([2])
    placed = place_inputs({"x": (image, index), "flag": True, "levels": [image]}, CPU, torch.float64)
    assert placed["x"][0].dtype == torch.float64
    assert placed["x"][1] is index
    assert placed["flag"] is True
    assert placed["levels"][0].dtype == torch.float64
    made = place_inputs(image.to("meta"), CPU, None)
    assert (made.device, made.shape, made.dtype) == (CPU, image.shape, torch.float32)
