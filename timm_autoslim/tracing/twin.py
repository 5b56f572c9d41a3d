"""A copy of a model without data, and examples to run it on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from timm_autoslim.errors import TraceError


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter, buffer and plain tensor attribute by name; a tied tensor appears once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            for leaf, value in store.items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    found[f"{path}.{leaf}" if path else leaf] = value
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return, for every further name of a tied tensor, the name it has in `named_tensors`."""
    first = {id(t): name for name, t in named_tensors(model).items()}
    ties = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers, module.__dict__):
            for leaf, value in store.items():
                name = f"{path}.{leaf}" if path else leaf
                if isinstance(value, Tensor) and first.get(id(value), name) != name:
                    ties[name] = first[id(value)]
    return ties


def _own(module: nn.Module) -> list[Tensor | None]:
    return [*module._parameters.values(), *module._buffers.values()]


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without data: every tensor is on the meta device. `model` is not touched."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(f"{path or 'the model'}: got a scripted module; convert the model before scripting it")
        if any(isinstance(t, (UninitializedParameter, UninitializedBuffer)) for t in _own(module)):
            raise TraceError(f"{path or 'the model'}: got a lazy module; run the model once on data, then convert it")
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        hollow: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
    return copy.deepcopy(model, memo)


def call(model: nn.Module, example: Any) -> Any:
    """Run the model on a tensor, a tuple or a dict of inputs."""
    if isinstance(example, dict):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def sized(example: Any, batch: int) -> Any:
    """Return the example on the meta device, with this many images."""
    if isinstance(example, Tensor):
        return torch.empty((batch, *example.shape[1:]), dtype=example.dtype, device="meta")
    if isinstance(example, dict):
        return {k: sized(v, batch) for k, v in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(sized(v, batch) for v in example)
    return example
