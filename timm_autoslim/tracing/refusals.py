"""Models and examples that cannot be converted, and what the error says when a forward raises."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from timm_autoslim.errors import TraceError, quote_error
from timm_autoslim.tracing.source import format_line
from timm_autoslim.utils.tensors import collect_tensors, named_tensors

# What a module is, and what to do about it.
Obstacle = tuple[str, str]

# Wrappers by the name of the class, so that their libraries need not be imported.
_DISTRIBUTED = "convert the model before it is wrapped, and wrap the supernet in DistributedDataParallel"
_WRAPPERS: dict[str, Obstacle] = {
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
# torch.ao's modules that compute with floating point numbers; torchvision's models have them before quantisation.
_FLOATING = ("FloatFunctional", "FXFloatFunctional")
_QUANTISED_TYPES = (torch.int8, torch.uint8)
# Folders of code that is not the model's, and names of code that stands in no file.
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<frozen")
_LARGE_PART = 0.2  # of the parameters


def check_model(model: nn.Module) -> None:
    """Make sure that every module can be copied and sliced.

    Raises:
        TraceError: a module is compiled, wrapped, scripted, lazy or quantised, or computes its weights in a hook.
    """
    modules = ((path or "the model", _find_module_obstacle(module)) for path, module in model.named_modules())
    tensors = ((name, _find_tensor_obstacle(tensor)) for name, tensor in named_tensors(model).items())
    for where, obstacle in chain(modules, tensors):  # modules first: a lazy tensor cannot be inspected
        if obstacle is not None:
            got, remedy = obstacle
            needed = "ordinary modules, with weights that are floating point numbers"
            raise TraceError.at(where, got=got, needed=needed, remedy=remedy)


def _find_module_obstacle(module: nn.Module) -> Obstacle | None:
    """Return what keeps this module from being converted, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a scripted module", "convert the model before scripting it"
    tensors = [*module._parameters.values(), *module._buffers.values()]
    if any(isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) for tensor in tensors):
        return "a lazy module", "run the model once on data, then convert it"
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS:
            return _WRAPPERS[kind.__name__]
        if _QUANTISED.match(kind.__module__) and kind.__name__ not in _FLOATING:
            got = f"a quantised module ({kind.__module__}.{kind.__name__})"
            return got, "convert the model before quantising it, and quantise what extract() returns"
    if getattr(module, "_compiled_call_impl", None) is not None:
        got = "a module compiled in place by Module.compile()"
        return got, "convert the model before compiling it, and compile extracted models"
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):  # weight_norm, spectral_norm, prune
            got = f"a hook that computes a weight in each call ({type(hook).__module__}.{type(hook).__name__})"
            return got, "remove it (remove_weight_norm, remove_spectral_norm, prune.remove), or use parametrizations"
    return None


def _find_tensor_obstacle(tensor: Tensor) -> Obstacle | None:
    """Return what keeps this tensor from being sliced, or None."""
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
    needed = "a tensor (N, C, H, W), or a tuple or dict of forward's arguments with a tensor in it"
    tensors = collect_tensors(example)
    if not tensors:
        got, needed = f"a {type(example).__name__} without a tensor", f"{needed}, such as torch.zeros(1, 3, 224, 224)"
        raise TraceError.at("example_input", got=got, needed=needed)
    empty = [tuple(t.shape) for t in tensors if not t.numel()]
    if empty:
        raise TraceError.at("example_input", got=f"a tensor of the shape {empty[0]}, which is empty", needed=needed)


def explain_failure(
    error: Exception,
    model: nn.Module,
    last: str,
    got: list[tuple[int, ...]],
    reads_data: bool = True,
    returned: Iterable[str] = (),
    example: Any = None,
) -> str:
    """Return the text of the error for a forward that raised: where, why, and what to do.

    Args:
        error: the exception that it raised.
        model: the model that ran.
        last: path of the module that was entered last.
        got: shapes of the tensors that entered it.
        reads_data: whether the code asked for the data of a tensor.
        returned: paths of the modules that had returned by then.
        example: what the model ran on.
    """
    running = _list_running(error, model)
    raised = running[-1] if running else last
    where = f"given inputs of the shapes {got}"
    if raised != last:
        where = f"in the code of {raised or 'the model'} after {last} had run"
    remedy = _find_misfit(model, example) or (
        "give another example_input, or look at this line: without convert, it may raise too"
    )
    if reads_data:
        part = _find_part(model, returned)
        remedy = "replace .item(), `if tensor`, nonzero and boolean masks there by operations such as torch.where"
        if part is not None:
            name, share = part
            remedy += (
                f"; or convert a part that has run before it: model.{name} has {share:.0%} of the parameters, and what "
                "extract() returns of it takes its place"
            )
    remedy = _find_detector(model, running) or remedy
    return (
        f"{last or 'the model'}: its forward raised {type(error).__name__} in "
        f"{'train' if model.training else 'eval'}() mode on the meta device{_quote_line(error)} "
        f"({quote_error(error)}), {where}; needed: a forward that runs on example_input without reading data values; "
        f"{remedy}"
    )


def _list_running(error: Exception, model: nn.Module) -> list[str]:
    """Return the paths of the modules whose code ran when an exception was raised, the outermost first."""
    paths = {id(module): path for path, module in model.named_modules()}
    running, frame = list[str](), error.__traceback__
    while frame is not None:
        path = paths.get(id(frame.tb_frame.f_locals.get("self")))
        running += [] if path is None else [path]
        frame = frame.tb_next
    return running


def _find_detector(model: nn.Module, running: Iterable[str]) -> str | None:
    """Return what to do about a detector of torchvision that has raised, or None.

    It takes lists of images of any sizes, and targets in train() mode, and picks boxes by their scores.
    """
    for path in running:
        module = model.get_submodule(path)
        of_torchvision = any(
            kind.__module__.startswith("torchvision.models.detection.") for kind in type(module).__mro__
        )
        if of_torchvision and isinstance(getattr(module, "backbone", None), nn.Module):
            part = ".".join(["model", *path.split("."), "backbone"] if path else ["model", "backbone"])
            return (
                "a detector takes lists of images and targets, and picks boxes by data, so no example_input lets it be "
                f"traced as one model: convert its backbone alone, convert({part}, torch.zeros(1, 3, 320, 320)), and "
                f"put what extract() returns in its place, {part} = ... (docs/howto/backbones.md)"
            )
    return None


def _find_misfit(model: nn.Module, example: Any) -> str | None:
    """Return what to do about an example that is no batch of images for the first convolution of the model, or None."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    tensors = collect_tensors(example)
    if first is None or len(tensors) != 1:
        return None
    shape, channels = tuple(tensors[0].shape), first.in_channels
    if len(shape) == 3 and shape[0] == channels:
        return f"give a batch of images, example_input[None]: of the shape {(1, *shape)}"
    if len(shape) == 4 and shape[1] != channels:
        images = f"torch.zeros{(1, channels, *shape[2:])}"
        return f"give images of {channels} channels, which the first convolution takes, such as {images}"
    if not tensors[0].is_floating_point():
        return f"give images as the model gets them, in {first.weight.dtype}: example_input.float() / 255, normalised"
    return None


def _quote_line(error: Exception) -> str:
    """Return the file, the number and the text of the line of the model's code that raised; empty if there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_MODEL)]
    if not frames:
        return ""
    text = f", `{frames[-1].line}`" if frames[-1].line else ""
    return f" at {format_line(frames[-1].filename, frames[-1].lineno or 0)}{text}"


def _find_part(model: nn.Module, returned: Iterable[str]) -> tuple[str, float] | None:
    """Return the largest part that had returned, and its share of the parameters; None if all are small."""
    total = sum(p.numel() for p in model.parameters()) or 1
    shares = {path: sum(p.numel() for p in model.get_submodule(path).parameters()) / total for path in returned if path}
    largest = max(shares, key=lambda path: (shares[path], -len(path)), default="")
    return (largest, shares[largest]) if largest and shares[largest] >= _LARGE_PART else None
