"""Folder -> plain model through `timm.create_model`: one timm entrypoint that builds the base and applies a recipe."""

from __future__ import annotations

import copy
import inspect
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import FeatureInfo, PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, register_model
from torch import Tensor, nn
from torch.func import functional_call

from timm_autoslim.errors import ArtifactError
from timm_autoslim.slicing import Axis, Slices, shrink_

__all__ = ["apply_recipe", "autoslim", "build_slimmed", "check_recipe", "create_base"]

ARCHITECTURE = "autoslim"
FORMAT = 1
TORCHVISION = "torchvision/"
RECIPE_KEYS = ("format", "base", "base_args", "sizes", "attributes", "widths")
# A recipe may come from a stranger: it may say how the base is built, never where weights or settings come from.
FORBIDDEN_ARGS = frozenset(
    "pretrained pretrained_cfg pretrained_cfg_overlay pretrained_model_args checkpoint_path cache_dir weights progress "
    "features_only out_indices feature_cls feature_cfg recipe device dtype".split()
)
# Far above anything timm's or torchvision's constructors are called with, far below what exhausts memory by itself.
MAX_ARG = 1_000_000
MAX_ITEMS = 1_000
MAX_DEPTH = 8


# ------------------------------------------------------------------------------------------------ the base


def create_base(name: str, **kwargs: Any) -> nn.Module:
    """Create the model that a recipe starts from, with random weights.

    Args:
        name: a timm model name (`resnet50`, `resnet50.a1_in1k`), or `torchvision/NAME` with a torchvision
            classification builder (`torchvision/resnet18`) or class (`torchvision/MNASNet`).
        **kwargs: arguments of its constructor. `num_classes` (0 for no head) and `in_chans` work for both. Weights
            are loaded only if these arguments say so (`pretrained=True`, or torchvision's `weights=`).

    Returns:
        The model. A torchvision model also carries what timm expects of one: `num_classes`, `num_features`,
        `head_hidden_size`, `feature_info` and `pretrained_cfg`.

    Raises:
        ArtifactError: the name is unknown, or the constructor refuses the arguments.
    """
    if name.startswith(TORCHVISION):
        return _create_torchvision(name.removeprefix(TORCHVISION), kwargs)
    arch = name.partition(".")[0]
    if arch == ARCHITECTURE or not arch.isidentifier() or not timm.is_model(arch):
        raise ArtifactError(
            f"base {reprlib.repr(name)} is unknown: needed a name of timm.list_models(), or 'torchvision/NAME' with a "
            "torchvision builder or class; pass base= with such a name, or update timm"
        )
    model: nn.Module = _construct(timm.create_model, name, name, **kwargs)
    return model


def _construct(function: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:  # a constructor may raise anything at all on arguments that it does not expect
        raise ArtifactError(
            f"base {name!r} cannot be created with {reprlib.repr(kwargs)}: {type(error).__name__}: {error}; "
            "change base_args= or the keyword arguments of create_model"
        ) from error


def _create_torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    in_chans, num_classes = kwargs.pop("in_chans", 3), kwargs.pop("num_classes", 1000)
    kwargs["num_classes"] = num_classes or 1  # torchvision has no headless models: the head is cut off below
    cls = getattr(torchvision.models, name, None)
    if name in torchvision.models.list_models(module=torchvision.models):
        kwargs.setdefault("weights", None)
        model = _construct(torchvision.models.get_model, TORCHVISION + name, name, **kwargs)
    elif inspect.isclass(cls) and issubclass(cls, nn.Module):
        model = _construct(cls, TORCHVISION + name, **kwargs)
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
    _describe_features(model)
    if num_classes == 0:
        _cut_heads(model)
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
    if stem is None or not _is_int(in_chans) or in_chans < 1:
        raise ArtifactError(
            f"in_chans={reprlib.repr(in_chans)}: {TORCHVISION}{name} cannot take it: needed a positive integer and a "
            "first convolution of three input channels without groups; leave in_chans out"
        )
    old = model.get_submodule(stem)
    assert isinstance(old, nn.Conv2d) and isinstance(old.padding, tuple)
    new = nn.Conv2d(
        in_chans, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, bias=old.bias is not None
    )  # type: ignore[arg-type]
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


def _describe_features(model: nn.Module) -> None:
    """Set `feature_info`, `num_features` and `head_hidden_size` of a torchvision model as it stands, slimmed or not.

    The taps are the last stage at each resolution, as in timm; a stage is a child of the model or of one of its
    Sequentials. They are measured by a forward on the meta device, which costs no arithmetic.
    """
    cfg: Any = model.pretrained_cfg
    heads = cfg["classifier"] if isinstance(cfg["classifier"], tuple) else (cfg["classifier"],)
    stages = {child: module for child, module in model.named_children()}
    for child, module in model.named_children():
        if isinstance(module, nn.Sequential):
            stages.update({f"{child}.{leaf}": inner for leaf, inner in module.named_children()})
    stages = {k: v for k, v in stages.items() if k.partition(".")[0] not in {h.partition(".")[0] for h in heads}}
    channels, height, width = cfg["input_size"]
    taps: dict[int, tuple[str, int]] = {}

    def record(name: str, out: object) -> None:
        # (N, C, H, W); one pixel is a pooled vector, and Swin's (N, H, W, C) is no square
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] == out.shape[3] > 1:
            taps[2 ** round(math.log2(height / out.shape[2]))] = (name, int(out.shape[1]))

    handles = [m.register_forward_hook(lambda _m, _i, out, name=k: record(name, out)) for k, m in stages.items()]
    tensors = {k: v.detach().to("meta") for k, v in (*model.named_parameters(), *model.named_buffers())}
    try:
        # two images, because BatchNorm refuses to train on one value per channel
        with torch.no_grad():
            functional_call(model, tensors, (torch.empty(2, channels, height, width, device="meta"),))
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        taps.clear()  # no feature taps: only features_only= needs them, and says so
    finally:
        for handle in handles:
            handle.remove()
    info = [{"num_chs": chs, "reduction": step, "module": name} for step, (name, chs) in sorted(taps.items())]
    model.feature_info = info  # type: ignore[assignment]
    head: Any = model.get_submodule(heads[0])
    hidden = head.in_features if isinstance(head, nn.Linear) else getattr(head, "in_channels", 0)
    model.head_hidden_size = hidden or getattr(model, "head_hidden_size", 0)
    model.num_features = taps[max(taps)][1] if taps else model.head_hidden_size


def _cut_heads(model: nn.Module) -> None:
    cfg: Any = model.pretrained_cfg
    for name in cfg["classifier"] if isinstance(cfg["classifier"], tuple) else (cfg["classifier"],):
        model.set_submodule(name, nn.Identity())
    model.num_classes = 0  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------ the recipe


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fail(where: str, got: object, needed: str) -> ArtifactError:
    text = got if isinstance(got, str) and got.startswith("shape ") else reprlib.repr(got)
    return ArtifactError(
        f"recipe {reprlib.repr(where)}: got {text}, needed {needed}; "
        "export the model again, with the base= and base_args= that it was created with"
    )


def check_recipe(recipe: object) -> dict[str, Any]:
    """Check a recipe as far as that goes without its base, and return a copy of it.

    Args:
        recipe: plain data, as `model.autoslim` or the `model_args` of an exported config.json hold it.

    Raises:
        ArtifactError: an unknown format or key, a value of the wrong type, or base_args that would load something.
    """
    if not isinstance(recipe, Mapping) or set(recipe) != set(RECIPE_KEYS):
        got = sorted(map(str, recipe)) if isinstance(recipe, Mapping) else recipe
        raise _fail("keys", got, f"a mapping with exactly {', '.join(RECIPE_KEYS)}")
    if not _is_int(recipe["format"]) or recipe["format"] != FORMAT:
        raise _fail("format", recipe["format"], f"{FORMAT} (a newer one needs a newer timm-autoslim)")
    if recipe["base"] is not None and not isinstance(recipe["base"], str):
        raise _fail("base", recipe["base"], "a name, or None")
    for part in ("base_args", "sizes", "attributes", "widths"):
        if not isinstance(recipe[part], Mapping) or not all(isinstance(key, str) for key in recipe[part]):
            raise _fail(part, recipe[part], "a mapping from names")
    for name, size in recipe["widths"].items():
        if not _is_int(size) or size < 1:
            raise _fail(f"widths.{name}", size, "a positive integer")
    refused = sorted(FORBIDDEN_ARGS & set(recipe["base_args"]))
    if refused:
        raise _fail(f"base_args.{refused[0]}", recipe["base_args"][refused[0]], "only arguments that shape the base")
    _check_plain("base_args", recipe["base_args"], MAX_DEPTH)
    return copy.deepcopy(dict(recipe))


def _check_plain(where: str, value: object, depth: int) -> None:
    """JSON-like data of a bounded size."""
    if depth and isinstance(value, Mapping | list | tuple) and len(value) <= MAX_ITEMS:
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if not isinstance(key, str | int):
                raise _fail(where, key, "a text key")
            _check_plain(f"{where}.{key}", item, depth - 1)
    elif isinstance(value, int | float):
        if not abs(value) <= MAX_ARG:
            raise _fail(where, value, f"a number of at most {MAX_ARG}")
    elif not (value is None or (isinstance(value, str) and len(value) <= MAX_ITEMS)):
        raise _fail(where, value, f"plain data of at most {MAX_ITEMS} items and {MAX_DEPTH} levels")


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any]) -> nn.Module:
    """Shrink a freshly created base in place to what its recipe says; everything is checked before anything changes.

    Args:
        model: the recipe's base, as `create_base` returns it.
        recipe: the plain data of an extracted model's `autoslim` attribute. Each size is the length of the prefix
            that is kept of its axis.

    Returns:
        The same model, with the recipe as its `autoslim` attribute.

    Raises:
        ArtifactError: the recipe is malformed, or does not fit the model; the model is unchanged.
    """
    checked = check_recipe(recipe)
    tensors = {name: _axes(model, name, sizes) for name, sizes in checked["sizes"].items()}
    shared: dict[int, tuple[str, tuple[Axis, ...]]] = {}
    for name, axes in tensors.items():
        first, other = shared.setdefault(id(_tensor(model, name)), (name, axes))
        if axes != other:
            raise _fail(f"sizes.{name}", checked["sizes"][name], f"the sizes of {first}, the same tensor")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in shared:  # tied parameters stay tied, whichever of their names the recipe lists
            tensors[name] = shared[id(parameter)][1]
    attributes = {path: _value(model, path, value) for path, value in checked["attributes"].items()}
    shrink_(model, Slices(tensors=tensors, attributes=attributes))
    model.autoslim = checked  # type: ignore[assignment]
    return model


def _walk(model: nn.Module, name: str) -> tuple[nn.Module, list[str]]:
    """The deepest submodule on a dotted path, and the rest of the path. Runs no property of the model."""
    parts = name.split(".")
    while len(parts) > 1 and isinstance(model._modules.get(parts[0]), nn.Module):
        model = model._modules[parts.pop(0)]  # type: ignore[assignment]
    return model, parts


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    module, parts = _walk(model, name)
    if len(parts) == 1:
        for store in (module._parameters, module._buffers, module.__dict__):
            found = store.get(parts[0])  # type: ignore[attr-defined]
            if isinstance(found, Tensor):
                return found
    return None


def _axes(model: nn.Module, name: str, sizes: object) -> tuple[Axis, ...]:
    where = f"sizes.{name}"
    tensor = _tensor(model, name)
    if tensor is None:
        raise _fail(where, sizes, f"a tensor of {type(model).__name__}, which has none of this name")
    if not isinstance(sizes, list | tuple) or len(sizes) != tensor.ndim:
        raise _fail(where, sizes, f"a list of {tensor.ndim} sizes for the shape {tuple(tensor.shape)}")
    for size, full in zip(sizes, tensor.shape, strict=True):
        if size is not None and not (_is_int(size) and 1 <= size <= full):
            raise _fail(where, sizes, f"for each axis None or an integer from 1 to the size in {tuple(tensor.shape)}")
    return tuple(None if size is None else ((0, size),) for size in sizes)


def _current(model: nn.Module, path: str) -> object:
    """What the base holds under an attribute's path, or None; steps where `slicing.set_attribute` does, no further."""
    module, parts = _walk(model, path)
    if any(part.startswith("_") for part in parts):
        return None
    found: object = vars(module).get(parts[0])
    for part in parts[1:]:
        if isinstance(found, list | tuple) and part.isdecimal() and part.isascii() and len(part) < 10:
            found = found[int(part)] if int(part) < len(found) else None
        elif isinstance(found, dict):
            found = found.get(part)
        elif isinstance(found, FeatureInfo):
            found = vars(found).get(part)
        else:
            return None
    return found


def _value(model: nn.Module, path: str, value: object) -> Any:
    where = f"attributes.{path}"
    now = _current(model, path)
    if _is_int(now):
        if not (_is_int(value) and 1 <= value <= now):  # type: ignore[operator]
            raise _fail(where, value, f"an integer from 1 to {now}")
        return value
    if isinstance(now, float):
        # the only floats that widths move are scales such as head_dim ** -0.5, which grow as the width shrinks
        if not (isinstance(value, float) and math.isfinite(value) and value * now > 0):
            raise _fail(where, value, f"a finite number of the sign of {now}")
        return value
    if isinstance(now, Sequence) and not isinstance(now, str) and now and all(map(_is_int, now)):
        fits = isinstance(value, list | tuple) and len(value) == len(now)
        if not fits or not all(_is_int(v) and 1 <= v <= n for v, n in zip(value, now, strict=True)):  # type: ignore
            raise _fail(where, value, f"{len(now)} positive integers, none above {tuple(now)}")
        return list(value) if isinstance(now, list) else tuple(value)  # type: ignore[call-overload]
    raise _fail(where, value, f"a number or integers of {type(model).__name__}, which has none under this path")


# ------------------------------------------------------------------------------------------------ the entrypoint


def build_slimmed(
    recipe: Mapping[str, Any], num_classes: int | None = None, global_pool: str | None = None, **kwargs: Any
) -> nn.Module:
    """Create a recipe's base, apply the recipe and fit the head: the structure that an exported folder describes.

    Args:
        recipe: the recipe, with a base.
        num_classes: size of the head, 0 for none; the base's when None.
        global_pool: timm's pooling before the head; the base's when None.
        **kwargs: further arguments of the base's constructor; they win over the recipe's `base_args`.

    Raises:
        ArtifactError: the recipe has no base, is malformed, or does not fit what its base builds.
    """
    checked = check_recipe(recipe)
    base = checked["base"]
    if base is None:
        raise ArtifactError("recipe 'base': got None, needed the name that creates the base; export with base=")
    args = {**checked["base_args"], **kwargs}
    native = checked["base_args"].get("num_classes", _base_cfg(base).num_classes)
    wanted = native if num_classes is None else num_classes
    # The recipe holds the head's tensors if its base had a head: such a base is built, and the head changed afterwards.
    args["num_classes"] = wanted if bool(wanted) == bool(native) else native
    model = apply_recipe(create_base(base, **args), checked)
    if base.startswith(TORCHVISION):
        _describe_features(model)
        if global_pool is not None or (wanted and not native):
            what = f"global_pool={global_pool!r}" if global_pool is not None else f"num_classes={wanted} without a head"
            raise ArtifactError(f"base {base!r} cannot take {what}: torchvision models have fixed heads; leave it out")
        if native and not wanted:
            _cut_heads(model)
    elif args["num_classes"] != wanted or global_pool not in (None, pool_type(model)):
        head = (wanted,) if global_pool is None else (wanted, global_pool)
        _construct(model.reset_classifier, base, *head)
    return model


def pool_type(model: nn.Module) -> str | None:
    """The pooling of a timm model's head (`avg`, `catavgmax`, ...), None where the model does not say."""
    head = getattr(model, "head", None)
    for owner, name in ((head, "global_pool"), (head, "pool_type"), (model, "global_pool")):
        pool = getattr(owner, name, None)
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str):
            return pool
    return None


def _base_cfg(base: str) -> Any:
    """timm's data settings of a base, without a place to load weights from: its weights do not fit a slimmed model."""
    found = None if base.startswith(TORCHVISION) else get_pretrained_cfg(base, allow_unregistered=True)
    cfg = (found or PretrainedCfg()).to_dict(remove_source=True)
    return PretrainedCfg(**{k: v for k, v in cfg.items() if k not in ("architecture", "custom_load", "label_offset")})


def _source_cfg(base: str, given: Any) -> dict[str, Any]:
    """The data settings and the place of the weights, as timm's loader takes them."""
    if not given or isinstance(given, str):
        return dict(_base_cfg(base).to_dict())
    cfg = dict(given if isinstance(given, Mapping) else given.to_dict())
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    weights = Path(cfg.get("file") or "") / "model.safetensors"
    if cfg.get("source") == "local-dir" and weights.is_file():
        # timm 1.0.16 reads a folder's weights with torch.load; as a file, every version reads safetensors
        cfg.update(source=None, file=str(weights))
    return cfg


def _feature_cfg(model: nn.Module, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """How timm taps features of this model: the base's own indices, and an extractor that needs no rewriting."""
    base = recipe["base"]
    info: Any = getattr(model, "feature_info", None)
    if not info:
        raise ArtifactError(f"features_only=True: base {base!r} has no feature_info; use forward hooks instead")
    if base.startswith(TORCHVISION):
        return {"feature_cls": "fx", "out_indices": tuple(range(len(info)))}
    kind = "getter" if hasattr(model, "forward_intermediates") else "hook"
    try:
        with torch.device("meta"):
            probe: Any = timm.create_model(base, features_only=True, **recipe["base_args"])
        indices = tuple(probe.feature_info.out_indices)
    except Exception:  # some bases cannot stand on the meta device, or have no extractor of their own
        indices = tuple(range(len(info)))
    return {"feature_cls": kind, "out_indices": indices}


def autoslim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's entrypoint for exported folders: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        pretrained: load the folder's weights.
        **kwargs: `recipe`, which config.json supplies, and anything that `timm.create_model` takes.

    Raises:
        ArtifactError: called without a recipe, or with one that is malformed or does not fit its base.
    """
    if kwargs.get("recipe") is None:
        raise ArtifactError(
            f"{ARCHITECTURE!r} is not an architecture of its own: got no recipe=, needed that of an exported model; "
            "load a folder by timm.create_model('local-dir:FOLDER', pretrained=True), or make one with "
            "timm_autoslim.export"
        )
    recipe = check_recipe(kwargs.pop("recipe"))
    base = recipe["base"] or ""
    cfg = _source_cfg(base, kwargs.pop("pretrained_cfg", None))
    channels = (cfg.get("input_size") or (3,))[0]
    first_conv = cfg.get("first_conv")
    if kwargs.get("in_chans", channels) == channels:
        cfg["first_conv"] = None  # nothing to adapt; older timm would adapt anything but three channels, or drop it
    explicit = frozenset(kwargs)
    # timm keeps a dict that is not empty, so the builder can still fill it in once there is a model to look at
    features: dict[str, Any] = {"out_indices": (0, 1, 2, 3, 4)}

    def build(**args: Any) -> nn.Module:
        # what the user said wins over base_args, and these over what timm derives from the data settings
        derived = {k: v for k, v in args.items() if k == "img_size" and k not in explicit and k in recipe["base_args"]}
        model = build_slimmed(recipe, **{k: v for k, v in args.items() if k not in derived})
        if kwargs.get("features_only"):
            features.update({k: v for k, v in _feature_cfg(model, recipe).items() if k not in explicit})
        return model

    model: Any = build_model_with_cfg(build, ARCHITECTURE, pretrained, pretrained_cfg=cfg, feature_cfg=features, **kwargs)
    for owner in (model, getattr(model, "model", None)):
        if isinstance(getattr(owner, "pretrained_cfg", None), dict):
            owner.pretrained_cfg["first_conv"] = first_conv
    assert isinstance(model, nn.Module)
    return model


register_model(autoslim)
