"""Silent residual branches: which BatchNorms end a branch, and that nothing else changes."""

import pytest
import timm
import torch
from helpers.marks import slow_but
from torch import nn

from timm_autoslim.training.residual import zero_last_norms

IMAGES = torch.zeros(1, 3, 64, 64)


def find_silent(model):
    norms = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [path for path, norm in norms if not norm.weight.any()]


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["resnet10t", "regnety_002", "cs3darknet_s"],
        ["resnet10t", "seresnet33ts", "regnety_002", "resnest14d", "skresnet18", "cs3darknet_s"],
    ),
)
def test_the_branches_are_those_of_timms_own_zero_init(name):
    expected = find_silent(timm.create_model(name, zero_init_last=True))
    model = timm.create_model(name, zero_init_last=False)
    assert not find_silent(model)
    assert zero_last_norms(model, IMAGES) == expected == find_silent(model)
    assert expected


def test_a_block_starts_as_its_shortcut_and_its_scale_learns():
    model = timm.create_model("mobilenetv2_035", num_classes=4).train()
    paths = zero_last_norms(model, IMAGES)
    blocks = {path.rpartition(".")[0] for path in paths}
    assert blocks == {f"blocks.{i}.{j}" for i, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for j in range(1, n)}
    block = model.get_submodule("blocks.1.1")
    inputs = torch.randn(2, block.conv_pw.in_channels, 8, 8)
    assert torch.equal(block(inputs), inputs)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(model.get_submodule(path).weight.grad.any() for path in paths)


class Branches(nn.Module):
    """Two sides of one depth, a branch that ends in ReLU, and one that ends in LayerNorm: none can start at zero."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.third = (self.make() for _ in range(3))
        self.fourth, self.norm = nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)

    def make(self):
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        x = self.left(x) + self.right(x)
        x = x + self.third(x).relu()
        return x + self.norm(self.fourth(x))


def test_branches_that_do_not_end_in_a_batch_norm_are_left_alone():
    model = Branches()
    assert zero_last_norms(model, IMAGES) == []
    assert find_silent(model) == []


def test_nothing_but_the_scales_is_touched():
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    paths = zero_last_norms(model, IMAGES)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [f"{path}.weight" for path in paths]
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
