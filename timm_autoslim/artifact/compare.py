"""Whether two models compute the same: their outputs for one image, with weights that hide no module's part in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from timm_autoslim.artifact.torchvision import SMALL_IMAGE
from timm_autoslim.slicing.slices import Slices, clear_caches, extract_model
from timm_autoslim.utils.meta import run_model

USUAL_SIZES = (32, 64, 96, 160, 192, 224, 256, 288, 320, 384, 448, 512)  # pixels
SMALL_WEIGHT = 1e-2  # parameters below it, such as a LayerScale of 1e-6, hide the branch that they scale


@torch.no_grad()
def find_difference(model: nn.Module, other: nn.Module, size: Sequence[int]) -> str:
    """Run two models with tensors of the same names and shapes, on the same weights and image, in evaluation mode.

    Both get the weights of `other`. Where these are nearly zero, such as a head or a branch that starts at zero, both
    get random ones: multiplied by zero, the outputs of two different layers would be equal.

    Args:
        model: a model on any device, of any type; it stays as it is.
        other: another in float32, which is left on the CPU with other weights.
        size: the shape (C, H, W) of an image that they are made for. A smaller one is tried first,
            and usual sizes last.

    Returns:
        What differs, empty if nothing does. Where `model` takes no image of these sizes, only the modules' types and
        settings are compared.
    """
    copied, other = _copy_model(model), other.to("cpu").eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in other.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < SMALL_WEIGHT:
                parameter.normal_(0, 0.1)
        copied.load_state_dict(other.state_dict(), assign=True)
        _share_buffers(copied, other)
        for image in make_images(size):
            outputs = _run_model(copied, image)
            if not isinstance(outputs, Exception):
                gap = _describe_gap(outputs, _run_model(other, image))
                cause = _find_first_module(copied, other) or _find_first_buffer(copied, other)
                parts = (f"{gap} for an image of {tuple(image.shape[2:])} pixels", cause)
                return gap and "; ".join(filter(None, parts))
    return _find_first_module(copied, other, attributes=False)


@torch.no_grad()
def find_failure(model: nn.Module, create_base: Callable[[], nn.Module], size: Sequence[int]) -> str:
    """Return what a model raises on images that its base takes; empty if it takes one, or if the base takes none.

    Args:
        model: a model on any device, of any type; it stays as it is.
        create_base: returns its base, on the meta device or the CPU; it is called if the model takes no image.
        size: the shape (C, H, W) of an image that they are made for; others are tried too, as above.
    """
    copied, images, failure = _copy_model(model).float(), list(make_images(size)), ""
    for image in images:
        outputs = _run_model(copied, image)
        if not isinstance(outputs, Exception):
            return ""
        failure = failure or f"{type(outputs).__name__}: {str(outputs)[:200]}"
    base = create_base().eval()
    device = next((p.device for p in base.parameters()), torch.device("cpu"))
    runs = any(not isinstance(_run_model(base, image.to(device)), Exception) for image in images)
    return failure if runs else ""


@torch.no_grad()
def find_unused_modules(model: nn.Module, examples: Iterable[Any]) -> set[str]:
    """Return the paths of the modules that do not run in evaluation, such as an auxiliary head.

    Args:
        model: a model on any device, of any type; it stays as it is.
        examples: inputs to try, one after the other, such as `make_images(size)`. There are no unused modules where the
            model takes none of them.
    """
    copied = _copy_model(model).float()
    paths = {path for path, _ in copied.named_modules()}
    used: set[str] = set()
    for path, module in copied.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: used.add(path))
    with torch.random.fork_rng(devices=[]):
        if any(not isinstance(_run_model(copied, example), Exception) for example in examples):
            return paths - used
    return set()


def _copy_model(model: nn.Module) -> nn.Module:
    copied = extract_model(model, Slices({}, {})).to("cpu").eval()
    clear_caches(copied.modules())  # what modules cached of other weights
    return copied


def make_images(size: Sequence[int]) -> Iterator[Tensor]:
    """Yield images (1, C, H, W) to try, of a size (C, H, W) and of usual ones."""
    channels, *sides = size
    small = tuple(min(side, SMALL_IMAGE) for side in sides)
    for shape in dict.fromkeys([small, tuple(sides), *((side, side) for side in USUAL_SIZES)]):
        yield torch.randn(1, channels, *shape)


def _share_buffers(model: nn.Module, other: nn.Module) -> None:
    """Give a model of a lower precision the other's constants where they are the same but for that."""
    for module, other_module in zip(model.modules(), other.modules(), strict=False):
        for name, buffer in module._buffers.items():
            exact = other_module._buffers.get(name)
            if buffer is not None and exact is not None and buffer.dtype != exact.dtype:
                same = buffer.shape == exact.shape and torch.equal(exact.to(buffer.dtype), buffer)
                module._buffers[name] = exact if same else buffer.to(exact.dtype)


def _run_model(model: nn.Module, example: Any) -> list[Tensor] | Exception:
    torch.manual_seed(0)
    try:
        return [leaf for leaf in tree_leaves(run_model(model, example)) if isinstance(leaf, Tensor)]
    except Exception as error:  # whatever a model raises on an image that it is not made for
        return error


def _describe_gap(outputs: list[Tensor], others: list[Tensor] | Exception) -> str:
    """Say how outputs differ."""
    if isinstance(others, Exception):
        return f"{type(others).__name__}: {str(others)[:200]}"
    kinds = [[f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in tensors] for tensors in (outputs, others)]
    if kinds[0] != kinds[1]:
        return f"outputs {', '.join(kinds[1])} instead of {', '.join(kinds[0])}"
    pairs = list(zip(outputs, others, strict=True))
    if all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
        return ""
    gaps = [(a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()]
    return f"outputs that differ by {max(gaps):.2g}"


def _find_first_module(model: nn.Module, other: nn.Module, attributes: bool = True) -> str:
    """Name the first module that is of another kind or has other settings, or other attributes (some only describe)."""
    for (path, module), (other_path, other_module) in zip(model.named_modules(), other.named_modules(), strict=False):
        place = path or "the model"
        if path != other_path:
            return f"first {place} in place of {other_path}"
        if "forward" in vars(module) and "forward" not in vars(other_module):
            return f"{place} has a forward of its own"
        texts = [f"{type(m).__name__}({m.extra_repr()})" for m in (module, other_module)]
        if texts[0] != texts[1]:
            return f"first {place}: {texts[0]} in place of {texts[1]}"
        for name, value in vars(module).items() if attributes else ():
            simple = isinstance(value, bool | int | float | str) and not name.startswith("_")
            if simple and value != vars(other_module).get(name):
                return f"first {name} of {place}: {value!r} in place of {vars(other_module).get(name)!r}"
    hooked = [path for path, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return f"{hooked[0] or 'the model'} has a forward hook" if hooked else ""


def _find_first_buffer(model: nn.Module, other: nn.Module) -> str:
    """Name the first buffer with other numbers. All of the state dict has the same, so it is one that is not in it."""
    others = dict(other.named_buffers())
    for name, buffer in model.named_buffers():
        same = name not in others or (buffer.shape == others[name].shape and torch.equal(buffer, others[name]))
        if not same:
            why = "no checkpoint holds it (half() and float() round it; `save` keeps it)"
            return f"first {name} has other numbers, and {why}"
    return ""
