"""Specs that are written by hand, and changes of their data."""

import copy

from torch import nn

from timm_autoslim.artifact.bases import create_base
from timm_autoslim.artifact.spec import Spec

# the out and in sizes of every layer of resnet10t that its last stage's and one inner width of 48 and 40 concern
RESNET = {
    "layer1.0.conv1": (40, None),
    "layer1.0.bn1": (40, None),
    "layer1.0.conv2": (None, 40),
    "layer4.0.conv2": (48, None),
    "layer4.0.bn2": (48, None),
    "layer4.0.downsample.1": (48, None),
    "layer4.0.downsample.2": (48, None),
    "fc": (None, 48),
}
RESNET_ATTRIBUTES = {"num_features": 48, "head_hidden_size": 48, "feature_info.4.num_chs": 48}


def make_spec(base, narrow, attributes=None, **base_args):
    """A spec written by hand: by module, the out and in sizes that are left."""
    model = create_base(base, **base_args)
    sizes, values = {}, dict(attributes or {})
    for name, (out, fan_in) in narrow.items():
        module = model.get_submodule(name)
        norm = isinstance(module, nn.BatchNorm2d)
        for leaf, tensor in (*module.named_parameters(), *module.named_buffers()):
            axes = [out, fan_in, None, None][: tensor.ndim]
            if any(axes):
                sizes[f"{name}.{leaf}"] = axes
        labels = ("num_features",) if norm else ("out_channels", "in_channels", "out_features", "in_features")
        for label in labels:
            size = out if label.startswith("out") or norm else fan_in
            if size is not None and hasattr(module, label):
                values[f"{name}.{label}"] = size
    widths = {name: out for name, (out, _) in narrow.items() if out and not name.endswith("bn1")}
    return Spec(base=base, base_args=base_args, sizes=sizes, attributes=values, widths=widths)


def changed(data, path, value):
    """A copy of nested data, with another value at one place."""
    copied = copy.deepcopy(data)
    *parents, leaf = path
    target = copied
    for part in parents:
        target = target[part]
    target[leaf] = value
    return copied
