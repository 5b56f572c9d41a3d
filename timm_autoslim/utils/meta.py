"""Meta copies of models, and running them: shapes without data, on torch's meta device."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_autoslim.errors import TraceError, quote_error
from timm_autoslim.utils.copying import copy_deeply
from timm_autoslim.utils.tensors import collect_tensors, map_tensors, named_tensors


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a meta copy of `model`: the same modules, with every tensor on the meta device.

    Raises:
        TraceError: an attribute of a module cannot be copied; the text names it.
    """
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        meta: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    try:
        return copy_deeply(model, memo)
    except Exception as error:
        raise TraceError(
            f"{_find_obstacle(model, memo)}: cannot be copied ({type(error).__name__}: {quote_error(error)}); needed: "
            "a model that copy.deepcopy copies; set the attribute to None, or create it in forward"
        ) from error


def _find_obstacle(model: nn.Module, memo: dict[int, Any]) -> str:
    """Return the path of the attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, {**memo, **{id(m): m for m in model.modules()}})
            except Exception:
                return f"{path}.{name}" if path else name
    return "the model"


# Generators of random numbers that models use, beside those of torch, numpy and Python themselves.
_GENERATOR_TYPES = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_SHARED: ContextVar[tuple[Any, ...]] = ContextVar("generators outside of the model", default=())


def is_generator(value: Any) -> bool:
    """Whether a value is a generator of random numbers with a state (that of the operating system has none)."""
    return isinstance(value, _GENERATOR_TYPES) and not isinstance(value, random.SystemRandom)


def list_generators(model: nn.Module) -> list[Any]:
    """Return the generators of random numbers that the modules of a model hold as attributes, or in lists and dicts."""
    generators = []
    kinds: dict[type, bool] = {}  # a model holds many values of few types
    for module in model.modules():
        for value in module.__dict__.values():
            members = value if type(value) in (list, tuple) else value.values() if type(value) is dict else (value,)
            for member in members:
                if type(member) not in kinds:
                    kinds[type(member)] = is_generator(member)
                if kinds[type(member)]:
                    generators.append(member)
    return generators


@contextlib.contextmanager
def sharing_generators(generators: Sequence[Any]) -> Iterator[None]:
    """Let every `fix_seed` inside the block take care of these generators too, which models use but do not hold."""
    token = _SHARED.set(tuple(generators))
    try:
        yield
    finally:
        _SHARED.reset(token)


@contextlib.contextmanager
def fix_seed(generators: Sequence[Any] = ()) -> Iterator[None]:
    """Run the block with the generators of torch (CPU), numpy and Python at seed 0, and put them back after it.

    A model that skips layers at random then takes the same path in every such block. Generators of numpy that are made
    in it without a seed are the same in every block too.

    Args:
        generators: other generators that the model holds.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(0)
        for generator in (random._inst, np.random.mtrand._rand, *_SHARED.get(), *generators):
            stack.callback(_seed(generator))
        bits: Any = np.random.bit_generator  # where numpy gets the entropy of generators without a seed
        stack.callback(setattr, bits, "randbits", bits.randbits)
        bits.randbits = lambda count: 0
        yield


def _seed(generator: Any) -> Callable[[], object]:
    """Set a generator to seed 0; return the function that puts its state back."""
    if isinstance(generator, random.Random):
        state: Any = generator.getstate()
        generator.seed(0)
        return lambda: generator.setstate(state)
    if isinstance(generator, np.random.RandomState):
        state = generator.get_state()
        generator.seed(0)
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        state = bits.state
        bits.state = type(bits)(0).state
        return lambda: setattr(bits, "state", state)
    state = generator.get_state()
    generator.manual_seed(0)
    return lambda: generator.set_state(state)


@contextlib.contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no weight of a meta copy ask for a gradient in the block, so that runs with gradients enabled record none."""
    tensors = [tensor for tensor in named_tensors(model).values() if tensor.requires_grad and tensor.is_leaf]
    for tensor in tensors:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(True)


def run_model(model: Callable[..., Any], example: Any) -> Any:
    """Return what the model returns for an example: one input, a tuple of inputs, or a dict of inputs by name."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def count_images(example: Any) -> int:
    """Return the length of the batch: the first dimension of the first tensor that has dimensions; 1 if none has."""
    return next((len(t) for t in collect_tensors(example) if t.dim()), 1)


def make_meta_example(example: Any, batch_size: int) -> Any:
    """Return the example with its tensors on the meta device and with another batch size.

    The first dimension of the first tensor is the batch. Other tensors change with it if their first dimension is as
    long; numbers, flags and other tensors stay as they are.
    """
    images = count_images(example)

    def replace(tensor: Tensor) -> Tensor:
        shape = (batch_size, *tensor.shape[1:]) if tensor.dim() and len(tensor) == images else tensor.shape
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    return map_tensors(replace, example)
