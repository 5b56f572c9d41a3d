"""The zoo: one smallish member of every family of convolutional models, from timm and from torchvision."""

from dataclasses import dataclass, field

import timm
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from helpers.models import CLASSES, randomise

IMAGES = 2


@dataclass(frozen=True)
class Member:
    """A model of the zoo.

    Attributes:
        library, name, arguments: what builds it; in torchvision, a builder or a class.
        pixels: the side of its images, hardly more than the least that its layers can take.
        small_head: replace its linear layers of a hundred million weights by small ones.
    """

    library: str
    name: str
    pixels: int = 64
    arguments: dict = field(default_factory=dict, hash=False)
    small_head: bool = False

    def __str__(self):
        return f"{self.library}/{self.name}"

    def build(self):
        """Return the model in eval mode, with random weights and statistics."""
        torch.manual_seed(0)
        with torch.device("meta" if self.small_head else "cpu"):
            if self.library == "timm":
                model = timm.create_model(self.name, num_classes=CLASSES, **self.arguments)
            else:
                model = getattr(torchvision.models, self.name)(num_classes=CLASSES, **self.arguments)
        if self.small_head:
            shrink_head(model)
            model.to_empty(device="cpu")
        return randomise(model).eval()

    def images(self):
        """Return a batch of random images (N, 3, H, W)."""
        return torch.randn(IMAGES, 3, self.pixels, self.pixels)


def _members(library, *names, **options):
    return [Member(library, name, **options) for name in names]


TIMM = [
    *_members("timm", "resnet10t", "resnet26", "resnext50_32x4d", "seresnet18", "resnetblur18", "mobilenetv1_100"),
    *_members("timm", "mobilenetv2_050", "mobilenetv3_small_050", "mnasnet_050", "efficientnet_b0", "regnetx_002"),
    *_members("timm", "regnety_002", "convnext_atto"),
    *_members("timm", "wide_resnet50_2", arguments={"layers": (1, 1, 1, 1)}),
    *_members("timm", "densenet121", arguments={"block_config": (3, 3, 2, 2)}),
    *_members("timm", "vgg11", "vgg11_bn", arguments={"mlp_ratio": 0.05}),
    *_members("timm", "inception_v3", pixels=96),
]
TORCHVISION = [
    *_members("torchvision", "resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small"),
    *_members("torchvision", "mnasnet0_5", "efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf"),
    *_members("torchvision", "shufflenet_v2_x0_5", "squeezenet1_1"),
    *_members("torchvision", "vgg11", "vgg11_bn", "alexnet", small_head=True),
    # a Wide-ResNet of one block to the stage
    *_members("torchvision", "ResNet", arguments={"block": Bottleneck, "layers": [1] * 4, "width_per_group": 128}),
    *_members("torchvision", "DenseNet", arguments={"block_config": (3, 3, 2, 2)}),
    *_members("torchvision", "convnext_tiny"),
    *_members("torchvision", "googlenet", arguments={"init_weights": False}),
    # its auxiliary head would need 299 pixels; googlenet has two
    *_members("torchvision", "inception_v3", pixels=96, arguments={"init_weights": False, "aux_logits": False}),
]
ZOO = TIMM + TORCHVISION


def shrink_head(model, width=96):
    """Give torchvision's VGG and AlexNet hidden linear layers of `width` features."""
    layers = [i for i, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
    sizes = [model.classifier[layers[0]].in_features, *[width] * (len(layers) - 1), CLASSES]
    for i, fan_in, fan_out in zip(layers, sizes[:-1], sizes[1:], strict=True):
        model.classifier[i] = nn.Linear(fan_in, fan_out, device="meta")
