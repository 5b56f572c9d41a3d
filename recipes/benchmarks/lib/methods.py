"""Call a public method of a model on a copy of it, and say what happened in facts that do not depend on the widths."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

_COMMON = frozenset(dir(nn.Module)) | frozenset(dir(nn.Sequential)) | frozenset(dir(nn.ModuleList)) | {"forward"}
# How far outputs may move when BatchNorm is folded into weights, as a share of the largest output: those of a base that
# keeps its outputs, and those of its slim models.
KEPT, KEPT_BY_SLIM = 2e-5, 2e-4
DRAWING = ("init", "reset_parameters", "reset_running")  # in names of methods that set weights or statistics anew
CLASSES = 7

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# By method, what it is called with, in turn; the images are put in place of `Tensor`, and larger ones' sides of `int`.
CALLS: dict[str, list[Arguments]] = {
    "as_sequential": [((), {})],
    "forward_features": [((Tensor,), {})],
    "forward_intermediates": [((Tensor,), {}), ((Tensor,), {"intermediates_only": True, "indices": 1})],
    "get_intermediate_layers": [((Tensor,), {"n": 1, "reshape": True})],
    "group_matcher": [((), {}), ((True,), {})],
    "prune_intermediate_layers": [((1,), {}), ((1,), {"prune_norm": True, "prune_head": True})],
    "reset_classifier": [((CLASSES,), {}), ((0,), {}), ((0, ""), {}), ((3, "avg"), {})],
    "reset": [((CLASSES,), {}), ((0,), {})],
    "set_clamp_enabled": [((True,), {})],
    "set_distilled_training": [((True,), {}), ((False,), {})],
    "set_grad_checkpointing": [((True,), {})],
    "set_input_size": [((), {"img_size": int})],
}
# Their arguments are what other methods hand on: those call them.
LEFT_TO_OTHERS = frozenset({"forward_head", "load_pretrained"})


def list_methods(cls: type, top: bool) -> list[str]:
    """Return the public methods of a class that can be called here: those in `CALLS`, and those without arguments."""
    names = []
    for name in dir(cls):
        static = inspect.getattr_static(cls, name)
        if name.startswith("_") or name in _COMMON or name in LEFT_TO_OTHERS or not callable(getattr(cls, name, None)):
            continue
        if isinstance(static, property) or inspect.isclass(static):
            continue
        if (name in CALLS and (top or name == "reset")) or (name not in CALLS and _needs_nothing(cls, name)):
            names.append(name)
    return names


def _needs_nothing(cls: type, name: str) -> bool:
    try:
        parameters = list(inspect.signature(getattr(cls, name)).parameters.values())
    except (TypeError, ValueError):
        return False
    if not isinstance(inspect.getattr_static(cls, name), staticmethod | classmethod):
        parameters = parameters[1:]
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


@dataclass(frozen=True)
class Call:
    """One call of a method.

    Attributes:
        path: the module that it is called on, "" for the model.
        method: its name; "reparameterize_model" is timm's function for any model.
        arguments: what it is called with.
    """

    path: str
    method: str
    arguments: Arguments = ((), {})

    def __str__(self) -> str:
        args, kwargs = self.arguments
        words = [_show(a) for a in args] + [f"{k}={_show(v)}" for k, v in kwargs.items()]
        return f"{self.path}{'.' if self.path else ''}{self.method}({', '.join(words)})"


def _show(value: Any) -> str:
    return {Tensor: "images", int: "twice the side"}.get(value, repr(value))


def list_calls(model: nn.Module) -> Iterator[Call]:
    """Yield the calls of a model's public methods, of the first module of each class of timm's or torchvision's."""
    yield Call("", "reparameterize_model")
    classes: set[type] = set()
    for path, module in model.named_modules():
        cls = type(module)
        if cls in classes or cls.__module__.startswith("torch."):
            continue
        classes.add(cls)
        for name in list_methods(cls, top=not path):
            for arguments in CALLS.get(name, [((), {})]):
                yield Call(path, name, arguments)


@dataclass(frozen=True)
class Outcome:
    """What a call did.

    Attributes:
        error: the exception that the call, or a forward after it, raised; empty if none did.
        returned: what the method returned, described.
        outputs: what the model returns afterwards for the images, or for larger ones, described; as in `describe`.
        facts: further numbers by name: of tensors, of parameters that get gradients, and by how much outputs changed.
    """

    error: str
    returned: Any = None
    outputs: Any = None
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)


def run_call(model: nn.Module, call: Call, images: Tensor) -> Outcome:
    """Make a call on a copy of the model, and run the copy."""
    torch.manual_seed(0)
    side = 2 * images.shape[-1]
    put: Callable[[Any], Any] = lambda v: images if v is Tensor else (side, side) if v is int else v  # noqa: E731
    copied = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            before = _flatten(copied(images))
            if call.method == "reparameterize_model":
                copied, returned = reparameterize_model(copied), None
            else:
                args, kwargs = call.arguments
                module = copied.get_submodule(call.path)
                returned = getattr(module, call.method)(*map(put, args), **{k: put(v) for k, v in kwargs.items()})
            if isinstance(returned, nn.Module) and call.path:  # what a parent's method puts in the module's place
                copied.set_submodule(call.path, returned)
        return Outcome("", describe(returned), *_run_after(copied, before, call, images))
    except Exception as error:  # whatever a model raises is a fact
        return Outcome(f"{type(error).__name__}: {str(error)[:160]}")


def _run_after(model: nn.Module, before: list[Tensor], call: Call, images: Tensor) -> tuple[Any, dict[str, float]]:
    """Run a model after a call, and return its outputs described, and facts."""
    sized = call.method == "set_input_size"
    inputs = torch.nn.functional.interpolate(images, scale_factor=2) if sized else images
    if call.method == "prune_intermediate_layers":  # what is left of the model gives features
        features: Any = model
        with torch.no_grad():
            return describe(features.forward_intermediates(inputs, indices=[0], intermediates_only=True)), {}
    if call.method in ("set_distilled_training", "set_grad_checkpointing"):
        outputs = model.train()(inputs)
        torch.autograd.backward(torch.stack([out.float().mean() for out in _flatten(outputs)]).sum())
        trained = [p.grad is not None for p in model.parameters() if p.requires_grad]
        return describe(outputs), {"parameters with gradients": sum(trained)}
    with torch.no_grad():
        outputs = model.eval()(inputs)
    after, change = _flatten(outputs), math.inf
    if [a.shape for a in after] == [b.shape for b in before]:
        change = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))
    facts: dict[str, float] = {"tensors": len(model.state_dict())}
    if not any(word in call.method for word in DRAWING):
        facts["change"] = change
    return describe(outputs), facts


def _flatten(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def describe(value: Any) -> Any:
    """Return what a value is, as data: of a tensor, its shape and whether all is finite."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "finite": bool(value.detach().isfinite().all())}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | str):
        return value
    return type(value).__name__


def is_narrower(base: Any, slim: Any) -> bool:
    """Whether a slim model did what its base did: the same, with no axis of a tensor longer."""
    if isinstance(base, dict) and set(base) == {"shape", "finite"}:
        if not isinstance(slim, dict) or set(slim) != set(base) or slim["finite"] < base["finite"]:
            return False
        shapes = base["shape"], slim["shape"]
        return len(shapes[0]) == len(shapes[1]) and all(b >= s for b, s in zip(*shapes, strict=True))
    if isinstance(base, dict):
        return (
            isinstance(slim, dict) and base.keys() == slim.keys() and all(is_narrower(base[k], slim[k]) for k in base)
        )
    if isinstance(base, list):
        return isinstance(slim, list) and len(base) == len(slim) and all(map(is_narrower, base, slim))
    return bool(base == slim)


def compare(base: Outcome, slim: Outcome) -> str:
    """Return what a slim model does otherwise than its base; where the base raises, it may do anything."""
    if base.error:
        return ""
    if slim.error:
        return slim.error
    if not is_narrower(base.returned, slim.returned):
        return f"returns {str(slim.returned)[:160]} where the base returns {str(base.returned)[:160]}"
    if not is_narrower(base.outputs, slim.outputs):
        return f"then gives {str(slim.outputs)[:160]} where the base gives {str(base.outputs)[:160]}"
    wrong = []
    for name, of_base in base.facts.items():
        value = slim.facts.get(name, math.inf)
        if name == "change" and of_base <= KEPT and value > KEPT_BY_SLIM:
            wrong.append(f"moves the outputs by {value:.1e}, the base by {of_base:.1e}")
        elif name != "change" and value != of_base:
            wrong.append(f"{name}: {value}, of the base {of_base}")
    return "; ".join(wrong)
