"""Two models are compared by their outputs, with weights under which every module counts, and by their modules."""

import pytest
import torch
from torch import nn

from timm_autoslim.artifact.compare import find_difference, find_failure, find_unused_modules, make_images


class Fixed(nn.Module):
    def __init__(self, factor=1.0, side=200):
        super().__init__()
        self.conv, self.factor, self.side = nn.Conv2d(3, 4, 3), factor, side

    def forward(self, x):
        if x.shape[-1] != self.side:
            raise ValueError("not that size")
        return self.conv(x).mean((2, 3)) * self.factor


@pytest.mark.parametrize("size", [(3, 200, 200), (3, 256, 200)])
def test_models_of_one_size_are_run_at_it(size):
    assert find_difference(Fixed(), Fixed(), size) == ""
    assert "outputs that differ by" in find_difference(Fixed(2.0), Fixed(), size)
    assert "factor of the model: 2.0 in place of 1.0" in find_difference(Fixed(2.0), Fixed(), size)


def test_models_of_another_size_than_they_say_are_run_at_a_usual_one():
    assert find_difference(Fixed(side=192), Fixed(side=192), (3, 300, 300)) == ""
    assert "of (192, 192) pixels" in find_difference(Fixed(2.0, side=192), Fixed(side=192), (3, 300, 300))


def test_models_that_take_no_image_are_compared_by_their_parts():
    assert find_difference(Fixed(2.0), Fixed(), (3, 64, 64)) == ""
    other = Fixed()
    other.conv.dilation = (2, 2)
    assert find_difference(other, Fixed(), (3, 64, 64)).startswith(
        "first conv: Conv2d(3, 4, kernel_size=(3, 3), stride="
    )


class Several(Fixed):
    def __init__(self, above=0.0, dtype=torch.float64):
        super().__init__()
        self.above, self.dtype = above, dtype

    def forward(self, x):
        out = super().forward(x)
        return {"sum": out.sum((), dtype=self.dtype), "above": [out > self.above, "text"]}


def test_every_tensor_of_the_outputs_counts():
    size = (3, 200, 200)
    assert find_difference(Several(), Several(), size) == ""
    assert find_difference(Several(above=9.0), Several(above=-9.0), size).startswith("outputs that differ by 1 for")
    message = find_difference(Several(dtype=torch.float32), Several(), size)
    assert message.startswith("outputs () of torch.float64, (1, 4) of torch.bool instead of () of torch.float32, ")


def test_a_lower_precision_is_no_difference():
    assert find_difference(Fixed().half(), Fixed(), (3, 200, 200)) == ""


class Headed(Fixed):
    """Its head runs in training alone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        out = super().forward(x)
        return self.head(out) if self.training else out


def test_modules_that_run_in_training_alone_are_unused():
    model = Headed().train()
    assert find_unused_modules(model, make_images((3, 200, 200))) == {"head"}
    assert model.training
    assert find_unused_modules(model, make_images((3, 64, 64))) == set()  # it takes none


def test_a_model_fails_where_its_base_runs():
    assert find_failure(Fixed(), Fixed, (3, 200, 200)) == ""
    assert find_failure(Fixed(side=210), Fixed, (3, 200, 200)) == "ValueError: not that size"
    assert find_failure(Fixed(side=210), lambda: Fixed().to("meta"), (3, 200, 200)) == "ValueError: not that size"
    assert find_failure(Fixed(side=210), lambda: Fixed(side=210), (3, 200, 200)) == ""  # neither runs


def test_weights_at_zero_hide_nothing():
    one, other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU())
    for model in (one, other):
        nn.init.zeros_(model[0].weight)
        nn.init.zeros_(model[0].bias)
    assert find_difference(one, other, (3, 64, 64)).endswith("first 1: ReLU() in place of GELU(approximate='none')")
    assert one[0].weight.abs().max() == 0


class Table(Fixed):
    """It multiplies by a table that its constructor computes, and that is in no checkpoint."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, 7)[:4], persistent=False)

    def forward(self, x):
        return super().forward(x) * self.table


def test_a_table_that_was_rounded_is_named():
    size = (3, 200, 200)
    assert find_difference(Table(), Table(), size) == find_difference(Table().half(), Table(), size) == ""
    assert "first table has other numbers, and no checkpoint" in find_difference(Table().half().float(), Table(), size)
