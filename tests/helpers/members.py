"""Small members of timm's classes, with random weights.

The convolutional families have members of usual depth in `helpers.zoo`.
"""

import inspect

import torch

from helpers.models import CLASSES, randomise
from timm_autoslim.artifact.bases import create_base, create_meta_base
from timm_autoslim.recipes.benchmarks.lib.members import MEMBERS

__all__ = ["MEMBERS", "build"]


def build(name):
    """Return a small member with random weights, in eval mode, its arguments, and the side of its images."""
    torch.manual_seed(0)
    pixels, arguments = MEMBERS[name]
    arguments = {"num_classes": CLASSES, **arguments}
    if "img_size" in inspect.signature(type(create_meta_base(name, **arguments)).__init__).parameters:
        arguments["img_size"] = pixels
    return randomise(create_base(name, **arguments)).eval(), arguments, pixels
