"""Whether two models are one function: compared by what they say of an image, with weights that let all parts speak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from timm_autoslim.artifact.torchvision import PROBE
from timm_autoslim.slicing.slices import Slices, clear_caches, extract_model

USUAL = (32, 64, 96, 160, 192, 224, 256, 288, 320, 384, 448, 512)  # pixels
FAINT = 1e-2  # parameters below it, such as a LayerScale of 1e-6, hide the branch that they scale


@torch.no_grad()
def difference(plain: nn.Module, again: nn.Module, size: Sequence[int]) -> str:
    """Run two models with tensors of the same names and shapes, on the same weights and image, in evaluation mode.

    Both get the weights of `again`, and where these are faint, such as a head or a branch that starts at zero, random
    ones: with its weights at zero one layer is as good as any other.

    Args:
        plain: a model on any device, of any type; it stays as it is.
        again: another in float32, which is left on the CPU with other weights.
        size: the shape (C, H, W) of an image that they are made for. A smaller one is tried first,
            and usual sizes last.

    Returns:
        What differs, empty if nothing does. Where `plain` takes no image of these sizes, only the modules' types and
        settings are compared.
    """
    mine, theirs = _copied(plain), again.to("cpu").eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in theirs.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < FAINT:
                parameter.normal_(0, 0.1)
        mine.load_state_dict(theirs.state_dict(), assign=True)
        _share_buffers(mine, theirs)
        for image in _images(size):
            needed = _outputs(mine, image)
            if not isinstance(needed, Exception):
                gap = _gap(needed, _outputs(theirs, image))
                said = (f"{gap} for an image of {tuple(image.shape[2:])} pixels", _first_module(mine, theirs))
                return gap and "; ".join(filter(None, said))
    return _first_module(mine, theirs, attributes=False)


@torch.no_grad()
def idle(plain: nn.Module, size: Sequence[int]) -> set[str]:
    """Return the paths of the modules that have no part in evaluation, such as an auxiliary head; `size` as above.

    There are none where `plain` takes no image of these sizes.
    """
    model = _copied(plain).float()
    ran: set[str] = set()
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: ran.add(path))
    with torch.random.fork_rng(devices=[]):
        if any(not isinstance(_outputs(model, image), Exception) for image in _images(size)):
            return {path for path, _ in model.named_modules()} - ran
    return set()


def _copied(model: nn.Module) -> nn.Module:
    copied = extract_model(model, Slices({}, {})).to("cpu").eval()
    clear_caches(copied.modules())  # what modules cached of other weights
    return copied


def _images(size: Sequence[int]) -> Iterator[Tensor]:
    channels, *sides = size
    for shape in dict.fromkeys([tuple(min(side, PROBE) for side in sides), tuple(sides), *((s, s) for s in USUAL)]):
        yield torch.randn(1, channels, *shape)


def _share_buffers(mine: nn.Module, theirs: nn.Module) -> None:
    """Give a model of a lower precision the other's constants where they are the same but for that."""
    for module, other in zip(mine.modules(), theirs.modules(), strict=False):
        for name, buffer in module._buffers.items():
            whole = other._buffers.get(name)
            if buffer is not None and whole is not None and buffer.dtype != whole.dtype:
                same = buffer.shape == whole.shape and torch.equal(whole.to(buffer.dtype), buffer)
                module._buffers[name] = whole if same else buffer.to(whole.dtype)


def _outputs(model: nn.Module, image: Tensor) -> list[Tensor] | Exception:
    torch.manual_seed(0)
    try:
        return [leaf for leaf in tree_leaves(model(image)) if isinstance(leaf, Tensor)]
    except Exception as error:  # whatever a model raises on an image that it is not made for
        return error


def _gap(mine: list[Tensor], theirs: list[Tensor] | Exception) -> str:
    """Say how outputs differ."""
    if isinstance(theirs, Exception):
        return f"{type(theirs).__name__}: {str(theirs)[:200]}"
    kinds = [[f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in out] for out in (mine, theirs)]
    if kinds[0] != kinds[1]:
        return f"outputs {', '.join(kinds[1])} instead of {', '.join(kinds[0])}"
    if all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(mine, theirs, strict=True)):
        return ""
    gaps = [(a.double() - b.double()).abs().max().item() for a, b in zip(mine, theirs, strict=True) if a.numel()]
    return f"outputs that differ by {max(gaps):.2g}"


def _first_module(mine: nn.Module, theirs: nn.Module, attributes: bool = True) -> str:
    """Name the first module that is of another kind or has other settings, or other attributes (some only describe)."""
    for (path, one), (other_path, other) in zip(mine.named_modules(), theirs.named_modules(), strict=False):
        place = path or "the model"
        if path != other_path:
            return f"first {place} in place of {other_path}"
        if "forward" in vars(one) and "forward" not in vars(other):
            return f"{place} has a forward of its own"
        texts = [f"{type(module).__name__}({module.extra_repr()})" for module in (one, other)]
        if texts[0] != texts[1]:
            return f"first {place}: {texts[0]} in place of {texts[1]}"
        for name, value in vars(one).items() if attributes else ():
            plain = isinstance(value, bool | int | float | str) and not name.startswith("_")
            if plain and value != vars(other).get(name):
                return f"first {name} of {place}: {value!r} in place of {vars(other).get(name)!r}"
    hooked = [path for path, module in mine.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return f"{hooked[0] or 'the model'} has a forward hook" if hooked else ""
