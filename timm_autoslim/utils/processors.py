"""What a CPU computes fast: the memory layout of weights, and the types that it has instructions for."""

from __future__ import annotations

import torch
from torch import nn

# Types that a CPU may have no instructions for. A resnet10t took 7 to 30 times as long in float16 as in float32 on one
# that has none, and 0.6 of the time in bfloat16, which it has.
_16_BIT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def describe_slow_type(model: nn.Module) -> str:
    """Return a warning that the CPU of a model has no instructions for its type; an empty text if it has."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.device.type == "cpu"}
    slow = [dtype for dtype, query in _16_BIT.items() if dtype in types and not _ask_onednn(query)]
    return (
        f"the model is in {slow[0]}, for which this CPU has no instructions: all takes many times as long as in "
        "float32. Give model.float() and images in float32, or use a GPU."
        if slow
        else ""
    )


def _ask_onednn(query: str) -> bool:
    """Return whether oneDNN finds the instructions on this CPU; True in a torch that was built without it."""
    ask = getattr(torch.ops.mkldnn, query, None)
    return ask is None or bool(ask())


def find_layout(model: nn.Module) -> torch.memory_format:
    """Return the memory layout of the weights of a model's convolutions: channels_last if one is so."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    return torch.contiguous_format if all(w.is_contiguous() for w in weights) else torch.channels_last


def set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    """Move the weights of a model's convolutions to a memory layout.

    On a CPU, channels_last is faster: eight timm models took 0.26 to 0.72 of the time to score, the subnets of a search
    0.84 (one thread, 32 to 128 pixels).
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.clone(memory_format=layout)  # `contiguous` keeps strides that fit both
