"""Slim models from specs that are written by hand, and ways to load what was exported of them."""

import pytest
import timm
import torch
from timm.models._hub import has_hf_hub
from torch import nn

from helpers.specs import RESNET, RESNET_ATTRIBUTES, make_spec
from timm_autoslim.artifact.build import build_slim

MOBILENET = {"features.18.0": (200, None), "features.18.1": (200, None), "classifier.1": (None, 200)}
TIMM_MOBILENET = {"blocks.1.0.conv_pw": (24, None), "blocks.1.0.bn1": (24, None), "blocks.1.0.conv_dw": (24, None),
                  "blocks.1.0.bn2": (24, None), "blocks.1.0.conv_pwl": (None, 24)}  # fmt: skip
SQUEEZENET = {"features.3.squeeze": (9, None), "features.3.expand1x1": (None, 9), "features.3.expand3x3": (None, 9)}
CASES = {
    "resnet10t": (RESNET, RESNET_ATTRIBUTES, {}),
    "mobilenetv2_035": (TIMM_MOBILENET, {"blocks.1.0.conv_dw.groups": 24}, {"num_classes": 11}),
    "test_vit": ({"blocks.0.mlp.fc1": (100, None), "blocks.0.mlp.fc2": (None, 100)}, {}, {"img_size": 96}),
    "torchvision/mobilenet_v2": (MOBILENET, {}, {}),
    "torchvision/squeezenet1_1": (SQUEEZENET, {}, {"num_classes": 4}),
    "torchvision/MNASNet": ({}, {}, {"alpha": 0.35}),
}


needs_hub = pytest.mark.skipif(not has_hf_hub(), reason="this timm does not work with this huggingface_hub")


def slim(base, **settings):
    """A slim model with BatchNorm statistics of this width, as after calibration."""
    narrow, attributes, base_args = CASES[base]
    model = build_slim(make_spec(base, narrow, attributes, **base_args), **settings)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked += 3
            module.running_mean.normal_(0, 0.1, generator=generator)
    return model.eval()


def load(folder, **kwargs):
    """The model of an exported folder, in evaluation mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def image(model, batch=1):
    """Images (N, C, 96, 96) of the channels that the model takes."""
    channels, size = model.pretrained_cfg["input_size"][0], 96
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))
