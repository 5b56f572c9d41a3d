"""Start a model with silent residual branches: the scale of the last BatchNorm of each branch is zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_autoslim.errors import ConfigError, quote_error
from timm_autoslim.tracing.outer_state import with_empty_caches
from timm_autoslim.utils.arguments import check_module, quote
from timm_autoslim.utils.meta import copy_to_meta, fix_seed, list_generators, make_meta_example, run_model
from timm_autoslim.utils.tensors import collect_tensors

# Operators that may follow the BatchNorm before the addition: they map zero to zero, and their gradient at zero is not
# zero (dropout, drop path, a gate, a layer scale, a change of shape, SiLU). ReLU is not among them.
_ZERO_TO_ZERO = frozenset(
    ("MulBackward0", "DivBackward0", "NativeDropoutBackward0", "AliasBackward0", "CloneBackward0", "ViewBackward0",
     "UnsafeViewBackward0", "ReshapeAliasBackward0", "PermuteBackward0", "TransposeBackward0", "ToCopyBackward0",
     "SiluBackward0", "HardswishBackward0", "GeluBackward0", "MishBackward0", "LeakyReluBackward0")
)  # fmt: skip
_CONTRACTIONS = frozenset(
    ("ConvolutionBackward0", "AddmmBackward0", "MmBackward0", "BmmBackward0", "LinearBackward0")
)  # fmt: skip


@torch.inference_mode(False)
def zero_last_norms(model: nn.Module, example: Any) -> list[str]:
    """Set the scale of the last BatchNorm of every residual branch to zero, so that each block starts as its shortcut.

    Source: Yu et al., "BigNAS", arXiv 2003.11142, section 3 (from Goyal et al., arXiv 1706.02677, section 5.1). One
    forward of a meta copy shows the branches: of the two sides of an addition, the one that passes through more
    convolutions and linear layers is the branch. It counts if it ends in a BatchNorm without a ReLU after it. Use it on
    a fresh model: frozen and trained weights are set to zero like all others.

    Args:
        model: changed in place.
        example: as `convert` takes it; only its shape is read.

    Returns:
        The paths of the BatchNorms, in the model's order; none if no branch ends in one.

    Raises:
        ConfigError: the model is no module, or it cannot run on the example.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import zero_last_norms
        >>> model = timm.create_model("resnet10t", num_classes=10, zero_init_last=False)
        >>> zero_last_norms(model, torch.zeros(1, 3, 32, 32))
        ['layer1.0.bn2', 'layer2.0.bn2', 'layer3.0.bn2', 'layer4.0.bn2']
    """
    check_module("model", model)
    if not collect_tensors(example):
        needed = "a tensor (N, C, H, W), or the inputs of the model's forward as a tuple or a dict"
        raise ConfigError.at("example", got=quote(example), needed=needed)
    meta = copy_to_meta(model).train()
    with torch.enable_grad(), fix_seed(list_generators(meta)):
        try:
            outputs = with_empty_caches(meta, lambda _: run_model(meta, make_meta_example(example, 2)))
        except (TypeError, RuntimeError) as error:
            got = f"one on which the forward raises {type(error).__name__}: {quote_error(error)}"
            raise ConfigError.at("example", got=got, needed="an example that the model takes") from error
    norms = {module.weight: path for path, module in meta.named_modules() if isinstance(module, _BatchNorm)}
    scales = _find_branch_scales(outputs)
    paths = [path for scale, path in norms.items() if scale in scales]
    with torch.no_grad():
        for path in paths:
            weight = model.get_submodule(path).weight
            assert isinstance(weight, nn.Parameter)
            weight.zero_()
    return paths


def _find_branch_scales(outputs: Any) -> set[nn.Parameter]:
    """Return the scales of the BatchNorms that end a residual branch."""
    scales: set[nn.Parameter] = set()
    depths: dict[Any, int] = {}  # how many contractions lead to a node
    for node in _sort_nodes(outputs):
        inputs = [parent for parent, _ in node.next_functions if parent is not None]
        depths[node] = max((depths[n] for n in inputs), default=0) + (node.name() in _CONTRACTIONS)
        if node.name() != "AddBackward0" or len(inputs) != 2 or depths[inputs[0]] == depths[inputs[1]]:
            continue
        last = set(_find_last_scales(max(inputs, key=lambda n: depths[n])))
        if len(last) == 1:
            scales |= last
    return scales


def _sort_nodes(outputs: Any) -> Iterator[Any]:
    """Yield the nodes of autograd's graph, each after its inputs."""
    stack = [(tensor.grad_fn, False) for tensor in collect_tensors(outputs) if tensor.grad_fn is not None]
    entered: set[Any] = set()
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.next_functions if parent is not None)


def _find_last_scales(node: Any) -> Iterator[nn.Parameter]:
    """Yield the scales of the BatchNorms whose output reaches `node` through operators that keep zeros zero."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node.name().endswith("BatchNormBackward0"):
            scale = node.next_functions[1][0]
            if scale is not None and hasattr(scale, "variable"):
                yield scale.variable
        elif node.name() in _ZERO_TO_ZERO:
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
