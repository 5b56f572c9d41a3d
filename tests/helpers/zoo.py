"""The convolutional models that the tests run on: one smallish member of every family, from timm and from torchvision.

Weights and BatchNorm statistics are random, zero-initialised BatchNorms and tiny LayerScales included: a wrong channel
that is multiplied by zero would go unseen.
"""

from dataclasses import dataclass, field

import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import Bottleneck

CLASSES = 10
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


def _members(library, *names, **given):
    return [Member(library, name, **given) for name in names]


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


@torch.no_grad()
def randomise(model):
    """Draw every parameter and every BatchNorm statistic anew, on a scale that keeps activations near 1."""
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        if fan_in > 1:
            bound = (4.5 / fan_in) ** 0.5
            parameter.uniform_(-bound, bound)
        elif name.endswith("bias"):
            parameter.uniform_(-0.3, 0.3)
        else:
            parameter.uniform_(0.5, 1.5)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return model


def without_chance(model):
    """Put `model` in training mode, but switch off what draws random numbers there."""
    model.train()
    for module in model.modules():
        if type(module).__name__ in ("Dropout", "DropPath", "StochasticDepth"):
            module.eval()
    return model


def tensors(out):
    """Return the tensors of a model's output: one, or in training those of the auxiliary heads as well."""
    return [out] if isinstance(out, torch.Tensor) else [t for t in out if t is not None]


def arbitrary_widths(space, generator):
    """Return random widths from 1 to the size, whatever the choices and divisors of the space."""
    return space.from_dict({g.name: int(torch.randint(1, g.size + 1, (), generator=generator)) for g in space.groups})


def some_widths(space, seed=0):
    """Return widths of every kind by name, the widest left out."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "min": space.min(),
        "half": space.uniform(0.5),
        "random": space.sample(generator),
        "arbitrary": arbitrary_widths(space, generator),
        "single": space.from_dict(dict.fromkeys(space.names, 1)),
    }


def snapshot(model):
    """Return all that a conversion could change in a model: tensors, and by module its flag, attributes and hooks."""
    values = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    rest = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks"):
                rest[path, name] = list(value)
            elif name in ("_parameters", "_buffers", "_modules"):
                rest[path, name] = {leaf: id(child) for leaf, child in value.items()}
            elif type(value) in (tuple, list):
                rest[path, name] = [(type(v), v) for v in value]
            else:
                rest[path, name] = (type(value), value)
    return values, rest


def assert_same(before, after):
    """Compare two snapshots of one model."""
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name


class Plain(nn.Module):
    """Three convolutions, BatchNorms and a classifier: the least model with groups of two kinds (8 and 16 channels)."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn_inner = nn.BatchNorm2d(2 * width)
        self.outer = nn.Conv2d(2 * width, width, 1, bias=False)
        self.bn_outer = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()  # (N, C, H, W)
        x = x + self.bn_outer(self.outer(self.bn_inner(self.inner(x)).relu()))
        return self.head(x.relu().mean((2, 3)))
