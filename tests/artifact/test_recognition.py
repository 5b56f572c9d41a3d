"""The names of torchvision's models, which do not know them."""

import pytest
import timm
import torch
import torchvision

from timm_autoslim import calibrate, convert, export
from timm_autoslim.artifact.recognition import recognize


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("squeezenet1_1", {}, ("squeezenet1_1", {})),
        pytest.param("wide_resnet50_2", {}, ("wide_resnet50_2", {}), marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", {"num_classes": 7}, ("mobilenet_v3_small", {"num_classes": 7}),
                     marks=pytest.mark.slow),
        pytest.param("swin_v2_t", {"num_classes": 3}, ("swin_v2_t", {"num_classes": 3}), marks=pytest.mark.slow),
        ("mobilenet_v3_small", {"dropout": 0.9}, None),  # no builder makes it without the argument
        pytest.param("resnet50", {"replace_stride_with_dilation": [False, False, True]}, None, marks=pytest.mark.slow),
        ("regnet_x_400mf", {}, None),  # its builder reads values
    ],
)  # fmt: skip
def test_the_builder_of_a_model_is_found(name, arguments, expected):
    assert recognize(torchvision.models.get_model(name, weights=None, **arguments)) == expected


def test_models_of_others_are_not_looked_for():
    assert recognize(torch.nn.Linear(2, 2)) is None


@pytest.mark.slow
def test_a_torchvision_model_is_exported_without_its_name(tmp_path):
    model = torchvision.models.mobilenet_v3_small(num_classes=7).eval()
    supernet = convert(model, torch.zeros(1, 3, 64, 64))
    assert supernet.base == "torchvision/mobilenet_v3_small"
    slim = supernet.extract(supernet.space.uniform(0.5)).eval()
    calibrate(slim, [torch.randn(8, 3, 64, 64)])
    again = timm.create_model(f"local-dir:{export(slim, tmp_path / 'slim')}", pretrained=True).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(image), slim(image))
