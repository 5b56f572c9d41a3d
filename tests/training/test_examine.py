"""What reconstruction has to know of two models."""

import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import nn

from timm_autoslim.errors import DataError
from timm_autoslim.training.examine import examine, renew_statistics


def find_reasons(model, inputs):
    with torch.no_grad():
        return {layer.name: layer.reason for layer in examine(model.eval(), model, inputs, len(inputs)).layers}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, padding=1), None),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), None),
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
        (nn.Conv2d(8, 8, 3, padding="same"), "its padding (same)"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "its padding (reflect)"),
        (ScaledStdConv2d(8, 8, 3, padding=1), "its forward is not that of its type"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), "its weight is computed from others"),
    ],
    ids=str,
)
def test_a_layer_is_solved_for_or_left_with_a_reason(layer, reason):
    assert find_reasons(nn.Sequential(layer), torch.randn(2, 8, 9, 9)) == {"0": reason}


def test_stops_are_in_the_order_of_the_forward_with_the_bytes_of_what_is_to_come():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2, 2), nn.Flatten())
    plan = examine(model.eval(), model, torch.randn(2, 3, 8, 8), 2)
    assert plan.stops == ("0", "1", "2")
    first, norm, second = (4 * 64 * (3 + 4), 4 * 64 * (4 + 4), 4 * (64 * 4 + 16 * 6))
    assert plan.sizes == (max(first, norm, second), max(norm, second), second)
    assert [layer.centered for layer in plan.layers] == [True, False]  # a BatchNorm takes the first one's mean
    assert plan.norms == ("1",)


def test_statistics_are_those_of_all_batches_together():
    norm, batches = nn.BatchNorm2d(3), [torch.randn(n, 3, 4, 4) + 2 for n in (2, 5)]
    renew_statistics([norm], batches)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, values.mean(1))
    torch.testing.assert_close(norm.running_var, values.var(1))
    assert int(norm.num_batches_tracked) == 2
    before = norm.running_mean.clone()
    renew_statistics([norm], [batches[0] + 9], keep=True)
    assert torch.equal(norm.running_mean, before)


def test_one_value_in_all_gives_no_statistics():
    norm = nn.BatchNorm2d(4)
    with pytest.raises(DataError, match="needed: two images or more"):
        renew_statistics([norm], [torch.zeros(1, 4, 1, 1)])
    renew_statistics([norm], [torch.zeros(1, 4, 1, 1)], keep=True)
    assert norm.running_var.equal(torch.ones(4))
