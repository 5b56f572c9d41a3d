"""Start a network with its residual branches silent: the scale of each branch's last BatchNorm is zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_autoslim.utils.meta import copy_to_meta, fix_seed, make_meta_example, run_model
from timm_autoslim.utils.tensors import collect_tensors

# What may stand between the BatchNorm and the addition: operators that map zero to zero and whose gradient is not zero
# there (dropout, drop path, a gate, a layer scale, a change of shape, SiLU). ReLU is not among them.
_PASSES = frozenset(
    ("MulBackward0", "DivBackward0", "NativeDropoutBackward0", "AliasBackward0", "CloneBackward0", "ViewBackward0",
     "UnsafeViewBackward0", "ReshapeAliasBackward0", "PermuteBackward0", "TransposeBackward0", "ToCopyBackward0",
     "SiluBackward0", "HardswishBackward0", "GeluBackward0", "MishBackward0", "LeakyReluBackward0")
)  # fmt: skip
_CONTRACTS = frozenset(
    ("ConvolutionBackward0", "AddmmBackward0", "MmBackward0", "BmmBackward0", "LinearBackward0")
)  # fmt: skip


@torch.inference_mode(False)
def zero_last_norms(model: nn.Module, example: Any) -> list[str]:
    """Set the scale of the last BatchNorm of every residual branch to zero, so that each block starts as its shortcut.

    Source: Yu et al., "BigNAS", arXiv 2003.11142, section 3 (from Goyal et al., arXiv 1706.02677, section 5.1). The
    branches are found by a forward without data: of the two sides of an addition, the one behind more convolutions is
    the branch, and it counts if it ends in a BatchNorm without a ReLU after it. Weights that are frozen or
    trained already are not told from others: use it on a fresh model.

    Args:
        model: changed in place.
        example: as `convert` takes it; only its shape is read.

    Returns:
        The paths of the BatchNorms, in the model's order; none if no branch ends in one.
    """
    twin = copy_to_meta(model).train()
    with torch.enable_grad(), fix_seed():
        outputs = run_model(twin, make_meta_example(example, 2))
    norms = {module.weight: path for path, module in twin.named_modules() if isinstance(module, _BatchNorm)}
    found = set()
    depths: dict[Any, int] = {}
    for node in _in_order(outputs):
        before = [following for following, _ in node.next_functions if following is not None]
        depths[node] = max((depths[n] for n in before), default=0) + (node.name() in _CONTRACTS)
        if node.name() != "AddBackward0" or len(before) != 2 or depths[before[0]] == depths[before[1]]:
            continue
        branch = max(before, key=lambda n: depths[n])
        scales = set(_last_scales(branch))
        if len(scales) == 1:
            found |= {norms[scale] for scale in scales if scale in norms}
    paths = [path for path in norms.values() if path in found]
    with torch.no_grad():
        for path in paths:
            weight = model.get_submodule(path).weight
            assert isinstance(weight, nn.Parameter)
            weight.zero_()
    return paths


def _in_order(outputs: Any) -> Iterator[Any]:
    """Yield the nodes of autograd's graph, each after those that it depends on."""
    waiting = [(tensor.grad_fn, False) for tensor in collect_tensors(outputs) if tensor.grad_fn is not None]
    seen: set[Any] = set()
    while waiting:
        node, ready = waiting.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting.extend((following, False) for following, _ in node.next_functions if following is not None)


def _last_scales(node: Any) -> Iterator[nn.Parameter]:
    """Yield the scales of the BatchNorms that `node`'s output comes from, through nothing but what passes zeros on."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.name().endswith("BatchNormBackward0"):
            scale = node.next_functions[1][0]
            if scale is not None and hasattr(scale, "variable"):
                yield scale.variable
        elif node.name() in _PASSES:
            waiting.extend(following for following, _ in node.next_functions if following is not None)
