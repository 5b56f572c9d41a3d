"""A copy of a model without data, and examples to run it on."""

from __future__ import annotations

import contextlib
import copy
import re
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from timm_autoslim.errors import TraceError

# Wrappers by the name of the class, so that none of their libraries is imported: what was got, and what to do.
_DISTRIBUTED = "convert the plain model, and wrap the supernet in DistributedDataParallel"
_WRAPPERS = {
    "OptimizedModule": ("a module compiled by torch.compile", "convert its `_orig_mod`, and compile extracted models"),
    "DataParallel": ("a module wrapped in DataParallel", "convert its `module`"),
    "DistributedDataParallel": ("a module wrapped in DistributedDataParallel", "convert its `module`, and wrap the "
                                "supernet"),
    "FullyShardedDataParallel": ("a module sharded by FSDP", _DISTRIBUTED),
    "FSDPModule": ("a module sharded by fully_shard (FSDP2)", _DISTRIBUTED),
    "DeepSpeedEngine": ("a module wrapped by DeepSpeed", _DISTRIBUTED),
}  # fmt: skip
_QUANTISED = re.compile(
    r"torch\.ao\.nn\.(intrinsic\.)?(quantized|qat)\b|torch\.ao\.quantization\.(observer|fake_quantize)$"
)
_FLOAT_AFTER_ALL = ("FloatFunctional", "FXFloatFunctional")  # in torchvision's models that are yet to be quantised
_QUANTISED_TYPES = (torch.int8, torch.uint8)


def tensors_in(value: Any) -> list[Tensor]:
    """Return every tensor in nested tuples, lists, dicts, dataclasses and other objects, in their order."""
    return list(_walk(value, set()))


def _walk(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if value is None or isinstance(value, (str, bytes, int, float, type, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))  # an object may hold itself
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (tuple, list, deque)):
        parts = list(value)
    else:
        parts = list(_attributes(value).values())
    for part in parts:
        yield from _walk(part, seen)


def _attributes(value: object) -> dict[str, Any]:
    """Return what an object holds, in its `__dict__` and in slots."""
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = [n for slot in slots for n in ([slot] if isinstance(slot, str) else slot)]
    return {**{n: getattr(value, n) for n in names if hasattr(value, n)}, **getattr(value, "__dict__", {})}


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


# -- what cannot be converted ---------------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Make sure that every module can be copied and sliced.

    Raises:
        TraceError: a module is compiled, wrapped, scripted, lazy or quantised, or computes its weights in a hook.
    """
    modules = ((path or "the model", _obstacle(module)) for path, module in model.named_modules())
    tensors = ((name, _unlike_a_weight(tensor)) for name, tensor in named_tensors(model).items())
    for place, found in chain(modules, tensors):  # one after the other: a lazy tensor answers no question
        if found is not None:
            what, remedy = found
            raise TraceError(
                f"{place}: got {what}; {remedy}; needed: ordinary modules, with weights that are floating point numbers"
            )


def _obstacle(module: nn.Module) -> tuple[str, str] | None:
    """Return what kind of module this is and what to do about it, if it cannot be converted."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a scripted module", "convert the model before scripting it"
    if any(isinstance(t, (UninitializedParameter, UninitializedBuffer)) for t in _own(module)):
        return "a lazy module", "run the model once on data, then convert it"
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS:
            return _WRAPPERS[kind.__name__]
        if _QUANTISED.match(kind.__module__) and kind.__name__ not in _FLOAT_AFTER_ALL:
            what = f"a quantised module ({kind.__module__}.{kind.__name__})"
            return what, "convert the model before quantising it, and quantise what extract() returns"
    if getattr(module, "_compiled_call_impl", None) is not None:
        what = "a module compiled in place by Module.compile()"
        return what, "convert the model before that, and compile extracted models"
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):  # weight_norm, spectral_norm, prune
            what = f"a hook that computes a weight anew in each call ({type(hook).__module__}.{type(hook).__name__})"
            return what, "remove it (remove_weight_norm, remove_spectral_norm, prune.remove), or use parametrizations"
    return None


def _unlike_a_weight(tensor: Tensor) -> tuple[str, str] | None:
    """Return what kind of tensor this is and what to do about it, if it cannot be sliced."""
    if tensor.is_quantized or (isinstance(tensor, nn.Parameter) and tensor.dtype in _QUANTISED_TYPES):
        return f"a quantised weight ({tensor.dtype})", "convert the model before quantising it"
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # sharded (DTensor), quantised by torchao
        return f"a tensor of {kind.__module__}.{kind.__name__}", "convert the model before it gets such tensors"
    if tensor.is_inference():
        return "a tensor made inside torch.inference_mode()", "build and load the model outside of it"
    return None


def check_example(example: Any) -> None:
    """Make sure that there is something to run the model on.

    Raises:
        TraceError: the example holds no tensor, or an empty one.
    """
    needed = "needed: a tensor (N, C, H, W), or a tuple or dict of forward's arguments with a tensor in it"
    tensors = tensors_in(example)
    if not tensors:
        raise TraceError(
            f"example_input: got a {type(example).__name__} without a tensor; {needed}, such as "
            "torch.zeros(1, 3, 224, 224)"
        )
    empty = [tuple(t.shape) for t in tensors if not t.numel()]
    if empty:
        raise TraceError(f"example_input: got a tensor of the shape {empty[0]}, which is empty; {needed}")


def _own(module: nn.Module) -> list[Tensor | None]:
    return [*module._parameters.values(), *module._buffers.values()]


# -- copies without data --------------------------------------------------------------------------------------------


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without data: every tensor is on the meta device. `model` is not touched.

    Raises:
        TraceError: an attribute of a module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        hollow: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:
        raise TraceError(
            f"{_uncopied(model, memo)}: cannot be copied ({type(error).__name__}: {_first_line(error)}); needed: a "
            "model that copy.deepcopy copies; set the attribute to None, or make it anew in forward"
        ) from error


def _uncopied(model: nn.Module, memo: dict[int, Any]) -> str:
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


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def what_failed(error: Exception, model: nn.Module, last: str, got: list[tuple[int, ...]]) -> str:
    """Say where and why a forward raised.

    Args:
        error: what it raised.
        model: the model that ran.
        last: path of the module that was entered last.
        got: shapes of the tensors that entered it.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    raised, frame = last, error.__traceback__
    while frame is not None:
        raised = paths.get(id(frame.tb_frame.f_locals.get("self")), raised)
        frame = frame.tb_next
    where = f"given inputs of the shapes {got}"
    if raised != last:
        where = f"in the code of {raised or 'the model'} after {last} had run"
    return (
        f"{last or 'the model'}: its forward raised {type(error).__name__} in "
        f"{'train' if model.training else 'eval'}() mode on the meta device ({_first_line(error)}), {where}; needed: a "
        "forward that runs on example_input without reading data values; give another example_input, or replace "
        ".item(), `if tensor`, nonzero and boolean masks by operations such as torch.where"
    )


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Let chance be the same in every block, so that a model that drops layers takes one path; restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def call(model: nn.Module, example: Any) -> Any:
    """Run the model on a tensor, a tuple or a dict of inputs."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def sized(example: Any, batch: int) -> Any:
    """Return the example on the meta device, with this many images.

    The first dimension of the first tensor is the batch, and so is that of every other tensor that is as long there.
    """
    images = next((len(t) for t in tensors_in(example) if t.dim()), 0)
    return _sized(example, images, batch)


def _sized(value: Any, images: int, batch: int) -> Any:
    if isinstance(value, Tensor):
        shape = (batch, *value.shape[1:]) if value.dim() and len(value) == images else value.shape
        return torch.empty(shape, dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        parts = [_sized(v, images, batch) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        filled: Any = copy.copy(value) if isinstance(value, MutableMapping) else {}
        for key, part in value.items():
            filled[key] = _sized(part, images, batch)
        return filled
    if tensors_in(value):  # a dataclass, or another object
        filled = copy.copy(value)
        for name, part in _attributes(value).items():
            object.__setattr__(filled, name, _sized(part, images, batch))
        return filled
    return value
