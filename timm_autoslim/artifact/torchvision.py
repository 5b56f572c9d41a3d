"""torchvision's models, described as timm describes its own."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.func import functional_call

from timm_autoslim.artifact.construct import TORCHVISION, construct
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.arguments import is_int

# pixels; at 128 the last of five halvings still has four
PROBE = 128


def create_torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Create a torchvision model by the name of its builder or class, with what timm expects of a model."""
    in_chans, num_classes = kwargs.pop("in_chans", 3), kwargs.pop("num_classes", 1000)
    if not is_int(num_classes) or num_classes < 0:
        raise ArtifactError(f"num_classes={reprlib.repr(num_classes)}: needed an integer, 0 for no head")
    kwargs["num_classes"] = num_classes or 1  # torchvision has no headless models: the head is cut off below
    cls = getattr(torchvision.models, name, None)
    if name in torchvision.models.list_models(module=torchvision.models):
        kwargs.setdefault("weights", None)
        model = construct(torchvision.models.get_model, TORCHVISION + name, name, **kwargs)
    elif inspect.isclass(cls) and issubclass(cls, nn.Module):
        model = construct(cls, TORCHVISION + name, **kwargs)
    else:
        raise ArtifactError(
            f"base {reprlib.repr(TORCHVISION + name)} is unknown: needed a name of "
            "torchvision.models.list_models(module=torchvision.models), or a model class of torchvision.models"
        )
    stem, heads = _stem(model), _heads(model)
    cfg = _torchvision_cfg(name, model, stem)
    if in_chans != 3:
        _adapt_stem(model, name, stem, in_chans)
    model.pretrained_cfg = {
        **cfg,
        "input_size": (in_chans, *cfg["input_size"][1:]),
        "num_classes": num_classes,
        "classifier": heads[0] if len(heads) == 1 else heads,
    }
    model.default_cfg = model.pretrained_cfg
    model.num_classes = num_classes
    if num_classes == 0:
        cut_heads(model)
    assert isinstance(model, nn.Module)
    return model


def _stem(model: nn.Module) -> str | None:
    """The first convolution, if it reads three-channel images."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name if module.in_channels == 3 and module.groups == 1 else None
    return None


def _heads(model: nn.Module) -> tuple[str, ...]:
    """The layers that produce logits: the last one of the model, and the last one of each auxiliary classifier."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    last = {name.partition(".")[0]: name for name in layers}
    auxiliary = [name for child, name in last.items() if child.lower().startswith("aux") and name != layers[-1]]
    return (layers[-1], *auxiliary)


def _adapt_stem(model: nn.Module, name: str, stem: str | None, in_chans: int) -> None:
    if stem is None or not is_int(in_chans) or in_chans < 1:
        raise ArtifactError(
            f"in_chans={reprlib.repr(in_chans)}: {TORCHVISION}{name} cannot take it: needed a positive integer and a "
            "first convolution of three input channels without groups; leave in_chans out"
        )
    old: Any = model.get_submodule(stem)
    new = nn.Conv2d(
        in_chans, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, bias=old.bias is not None
    )
    model.set_submodule(stem, new)


def _torchvision_cfg(name: str, model: nn.Module, stem: str | None) -> dict[str, Any]:
    """Data settings in timm's terms, from torchvision's default weights where there are some (the presets)."""
    cfg: dict[str, Any] = PretrainedCfg(interpolation="bilinear", first_conv=stem).to_dict()
    cfg.pop("architecture", None)
    size = getattr(model, "image_size", None)
    try:
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    except (ValueError, AttributeError):  # a class, or a builder without weights
        preset = None
    if preset is not None:
        size = size or preset.crop_size[0]
        cfg.update(mean=tuple(preset.mean), std=tuple(preset.std), interpolation=preset.interpolation.value)
        cfg["crop_pct"] = round(min(1.0, preset.crop_size[0] / preset.resize_size[0]), 4)
    size = size or 224
    cfg["input_size"] = (3, size, size)
    return cfg


def describe_features(model: Any, taps: Sequence[Sequence[Any]] | None = None) -> None:
    """Set `feature_info`, `num_features` and `head_hidden_size` of a torchvision model as it stands, slimmed or not.

    The taps are the last stage at each resolution, as in timm; a stage is a child of the model or of one of its
    Sequentials or ModuleLists. They are measured by one small forward, unless they are known.

    Args:
        model: the model, with its `pretrained_cfg`.
        taps: what `feature_taps` returned for a model like this one.

    Raises:
        ArtifactError: the taps are malformed, or name modules that the model lacks.
    """
    known = _measure_taps(model) if taps is None else _check_taps(model, taps)
    head: Any = model.get_submodule(_head_names(model)[0])
    hidden = getattr(head, "in_features", None) or getattr(head, "in_channels", None)
    model.feature_info = [{"num_chs": n, "reduction": step, "module": k} for k, n, step in known]
    model.num_features = known[-1][1] if known else hidden or 0
    model.head_hidden_size = hidden or model.num_features


def feature_taps(model: Any) -> list[list[Any]]:
    """Return `feature_info` as plain data: of each tap its module, channels and reduction of the image."""
    return [[info["module"], info["num_chs"], info["reduction"]] for info in model.feature_info]


def _check_taps(model: nn.Module, taps: Any) -> list[Any]:
    modules = dict(model.named_modules())

    def is_tap(tap: Any) -> bool:
        if not isinstance(tap, list | tuple) or len(tap) != 3 or not isinstance(tap[0], str):
            return False
        return tap[0] in modules and all(is_int(n) and n > 0 for n in tap[1:])

    if not isinstance(taps, list | tuple) or not all(map(is_tap, taps)):
        raise ArtifactError(
            f"taps: got {reprlib.repr(taps)}, needed lists of a module of the model, its channels and its reduction; "
            "export the model anew"
        )
    return list(taps)


def _measure_taps(model: Any) -> list[tuple[str, int, int]]:
    names = _head_names(model)
    stages = dict(model.named_children())
    for child, module in model.named_children():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            stages.update({f"{child}.{leaf}": inner for leaf, inner in module.named_children()})
    outside = {name.partition(".")[0] for name in names}
    stages = {
        name: module
        for name, module in stages.items()
        if name.partition(".")[0] not in outside and not isinstance(module, nn.AdaptiveAvgPool2d)
    }
    training = model.training
    try:
        taps = _measure(model.eval(), stages)
    finally:
        model.train(training)
    return [(name, channels, step) for step, (name, channels) in sorted(taps.items())]


def _measure(model: Any, stages: dict[str, nn.Module]) -> dict[int, tuple[str, int]]:
    """By reduction of the image, the last stage that produces it and its channels."""
    channels, height, width = model.pretrained_cfg["input_size"]
    taps: dict[int, tuple[str, int]] = {}
    size = height

    def record(name: str, out: object) -> None:
        # (N, C, H, W); one pixel is a pooled vector, and Swin's (N, H, W, C) is no square
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] == out.shape[3] > 1:
            taps[2 ** round(math.log2(size / out.shape[2]))] = (name, int(out.shape[1]))

    handles = [m.register_forward_hook(lambda _m, _i, out, name=k: record(name, out)) for k, m in stages.items()]
    tensors = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}
    # A small image is far quicker than the meta device; a model of a fixed image size needs its own, on meta.
    real = not any(tensor.is_meta for tensor in tensors.values())
    try:
        for size in (PROBE, height) if real else (height,):
            small = real and size == PROBE
            used = tensors if small else {k: v.to("meta") for k, v in tensors.items()}
            image = torch.zeros(1, channels, size, width if size == height else size)
            taps.clear()
            try:
                with torch.no_grad():
                    functional_call(model, used, (image.to(next(iter(used.values()))),))
                break
            except Exception:  # whatever a model raises: without taps only features_only= fails, and says why
                taps.clear()
    finally:
        for handle in handles:
            handle.remove()
    return taps


def _head_names(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg["classifier"]
    return names if isinstance(names, tuple) else (names,)


def cut_heads(model: Any) -> None:
    """Replace the classifiers of a torchvision model by nothing, as `num_classes=0` means in timm."""
    for name in _head_names(model):
        model.set_submodule(name, nn.Identity())
    model.num_classes = 0
