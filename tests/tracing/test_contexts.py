"""Where a model is and where it is converted: the meta device, inference mode, autocast; random paths."""

import pytest
import torch
from helpers.conversions import IMAGE, Net, check_conversion, make_images, make_net, read_outline
from helpers.models import TwoGroups, randomise
from torch import nn

from timm_autoslim import convert, cost


def test_a_model_on_the_meta_device_is_converted():
    model = make_net().to("meta")
    before = read_outline(model)
    supernet = convert(model, IMAGE)
    assert read_outline(model) == before
    widths = supernet.space.from_dict({"stem": 5, "inner": 7, "a": 2, "b": 8})
    extracted = supernet.extract(widths)
    assert extracted.a.weight.shape == (2, 5, 1, 1)
    assert extracted.a.weight.is_meta
    assert supernet(IMAGE.to("meta"), widths).shape == extracted(IMAGE.to("meta")).shape == (1, 10)
    assert cost(supernet, widths).params == sum(p.numel() for p in extracted.parameters())


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu"), lambda: torch.device("meta")],
    ids=["inference_mode", "no_grad", "autocast", "meta"],
)
def test_the_context_of_the_call_changes_nothing(context):
    expected = convert(make_net(), IMAGE, order="l1")
    model = make_net()
    model.load_state_dict(expected.model.state_dict())
    with context():
        supernet = convert(model, IMAGE, order="l1")
    assert supernet.space.max() == expected.space.max()
    assert supernet.graph.fixed == expected.graph.fixed
    supernet.train()(make_images(), supernet.space.min()).sum().backward()
    assert all(p.grad is not None for p in supernet.parameters())


def test_layers_that_are_dropped_at_random_are_traced_along_one_path():
    def body(self, x):
        x = self.maps(x)
        for layer in self.layers:
            if not self.training or torch.rand([]) < 0.5:
                x = x + layer(x)
        return self.logits(x)

    supernet = check_conversion(randomise(Net(body, layers=nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(8)))))
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}
    assert not supernet.repairs


def test_a_model_that_stores_an_activation_can_be_extracted_after_a_pass_with_gradients():
    class Storing(TwoGroups):
        def forward(self, x):
            self.last = self.stem(x)
            return super().forward(x)

    images = torch.randn(2, 3, 16, 16)
    supernet = convert(Storing().eval(), images)
    widths = supernet.space.min()
    expected = supernet(images, widths)
    assert torch.equal(supernet.extract(widths)(images), expected)
