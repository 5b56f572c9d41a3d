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

from timm_autoslim.artifact.spec import TORCHVISION
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.arguments import is_int

# Pixels of the side of the image that features are measured on; after five halvings four are left.
SMALL_IMAGE = 128


def construct_torchvision(name: str, /, *, in_chans: Any = 3, num_classes: Any = 1000, **kwargs: Any) -> nn.Module:
    """Create a torchvision model by the name of its builder or class, with `pretrained_cfg` and `num_classes`.

    Raises:
        ArtifactError: the name is unknown, or the model cannot take these classes or channels.
    """
    if not is_int(num_classes) or num_classes < 0:
        raise ArtifactError.at("num_classes", got=reprlib.repr(num_classes), needed="an integer, 0 for no head")
    kwargs["num_classes"] = num_classes or 1  # torchvision has no models without a head: it is removed below
    cls = getattr(torchvision.models, name, None)
    if name in torchvision.models.list_models(module=torchvision.models):
        model: Any = torchvision.models.get_model(name, **{"weights": None, **kwargs})
    elif inspect.isclass(cls) and issubclass(cls, nn.Module):
        model = cls(**kwargs)
    else:
        raise ArtifactError.at(
            "base",
            got=f"{reprlib.repr(TORCHVISION + name)}, which is unknown",
            needed="a name of torchvision.models.list_models(module=torchvision.models), or a model class of "
            "torchvision.models",
        )
    stem, heads = _find_first_convolution(model), _find_classifiers(model)
    cfg = _make_data_settings(name, model, stem)
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
        remove_classifiers(model)
    assert isinstance(model, nn.Module)
    return model


def _find_first_convolution(model: nn.Module) -> str | None:
    """Return the path of the first convolution, if it reads three-channel images."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name if module.in_channels == 3 and module.groups == 1 else None
    return None


def _find_classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the layers that produce logits: the last of the model, and of each auxiliary classifier."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    last = {name.partition(".")[0]: name for name in layers}
    auxiliary = [name for child, name in last.items() if child.lower().startswith("aux") and name != layers[-1]]
    return (layers[-1], *auxiliary)


def _adapt_stem(model: nn.Module, name: str, stem: str | None, in_chans: int) -> None:
    if stem is None or not is_int(in_chans) or in_chans < 1:
        raise ArtifactError.at(
            "in_chans",
            got=f"{reprlib.repr(in_chans)}, which {TORCHVISION}{name} cannot take",
            needed="a positive integer, and a first convolution of three input channels without groups",
            remedy="leave in_chans out",
        )
    old: Any = model.get_submodule(stem)
    new = nn.Conv2d(
        in_chans, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, bias=old.bias is not None
    )
    model.set_submodule(stem, new)


def _make_data_settings(name: str, model: nn.Module, stem: str | None) -> dict[str, Any]:
    """Return timm's data settings, from torchvision's default weights where there are some."""
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


def remove_classifiers(model: Any) -> None:
    """Replace the classifiers of a torchvision model by nothing, as `num_classes=0` means in timm."""
    for name in _list_classifiers(model):
        model.set_submodule(name, nn.Identity())
    model.num_classes = 0


def _list_classifiers(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg["classifier"]
    return names if isinstance(names, tuple) else (names,)


# ------------------------------------------------------------------------------------------------ features


def describe_features(model: Any, taps: Sequence[Sequence[Any]] | None = None) -> None:
    """Set `feature_info`, `num_features` and `head_hidden_size` of a torchvision model as it stands, slim or not.

    A tap is a module whose output is a feature map: the last stage at each resolution, as in timm. A stage is a child
    of the model or of one of its Sequentials or ModuleLists.

    Args:
        model: the model, with its `pretrained_cfg`.
        taps: what `list_taps` returned for a model like this one. Without them the taps are measured by one small
            forward.

    Raises:
        ArtifactError: the taps are malformed, or name modules that the model lacks.
    """
    taps = _measure_taps(model) if taps is None else _check_taps(model, taps)
    head: Any = model.get_submodule(_list_classifiers(model)[0])
    hidden = getattr(head, "in_features", None) or getattr(head, "in_channels", None)
    model.feature_info = [{"num_chs": n, "reduction": step, "module": name} for name, n, step in taps]
    model.num_features = taps[-1][1] if taps else hidden or 0
    model.head_hidden_size = hidden or model.num_features


def list_taps(model: Any) -> list[list[Any]]:
    """Return the model's `feature_info` as JSON data: of each tap its module, channels and reduction of the image."""
    return [[info["module"], info["num_chs"], info["reduction"]] for info in model.feature_info]


def _check_taps(model: nn.Module, taps: Any) -> list[Any]:
    modules = dict(model.named_modules())

    def is_tap(tap: Any) -> bool:
        if not isinstance(tap, list | tuple) or len(tap) != 3 or not isinstance(tap[0], str):
            return False
        return tap[0] in modules and all(is_int(n) and n > 0 for n in tap[1:])

    if not isinstance(taps, list | tuple) or not all(map(is_tap, taps)):
        raise ArtifactError.at(
            "taps",
            got=reprlib.repr(taps),
            needed="lists of a module of the model, its channels and its reduction",
            remedy="export the model again",
        )
    return list(taps)


def _measure_taps(model: Any) -> list[tuple[str, int, int]]:
    classifiers = {name.partition(".")[0] for name in _list_classifiers(model)}
    stages = dict(model.named_children())
    for child, module in model.named_children():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            stages.update({f"{child}.{leaf}": inner for leaf, inner in module.named_children()})
    stages = {
        name: module
        for name, module in stages.items()
        if name.partition(".")[0] not in classifiers and not isinstance(module, nn.AdaptiveAvgPool2d)
    }
    training = model.training
    try:
        taps = _run_with_taps(model.eval(), stages)
    finally:
        model.train(training)
    return [(name, channels, step) for step, (name, channels) in sorted(taps.items())]


def _run_with_taps(model: Any, stages: dict[str, nn.Module]) -> dict[int, tuple[str, int]]:
    """Return, by reduction of the image, the last stage that produces it and its channels."""
    channels, height, width = model.pretrained_cfg["input_size"]
    taps: dict[int, tuple[str, int]] = {}
    size = height

    def record(name: str, out: object) -> None:
        # (N, C, H, W); one pixel is a pooled vector, and Swin's (N, H, W, C) is no square
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] == out.shape[3] > 1:
            taps[2 ** round(math.log2(size / out.shape[2]))] = (name, int(out.shape[1]))

    handles = [m.register_forward_hook(lambda _m, _i, out, name=k: record(name, out)) for k, m in stages.items()]
    tensors = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}
    # A small image is far quicker than the meta device; a model of a fixed image size needs that size, on meta.
    on_meta = any(tensor.is_meta for tensor in tensors.values())
    try:
        for size in (height,) if on_meta else (SMALL_IMAGE, height):
            small = not on_meta and size == SMALL_IMAGE
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
