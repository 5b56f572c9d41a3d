"""Folder -> plain model through `timm.create_model`: one timm entrypoint that builds the base and applies a recipe."""

from __future__ import annotations

import copy
import math
import reprlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import FeatureInfo, PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, register_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_autoslim.bases import (
    ARCHITECTURE,
    TORCHVISION,
    construct,
    create_base,
    create_raw,
    cut_heads,
    describe_features,
    is_int,
)
from timm_autoslim.errors import ArtifactError
from timm_autoslim.slicing import Axis, Slices, shrink_

__all__ = ["apply_recipe", "autoslim", "build_slimmed", "check_recipe", "create_base"]

FORMAT = 1
RECIPE_KEYS = ("format", "base", "base_args", "sizes", "attributes", "widths")
# A recipe may come from a stranger: it may say how the base is built, never where weights or settings come from.
FORBIDDEN_ARGS = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path"),
        *("cache_dir", "weights", "progress", "recipe", "device", "dtype"),
        *("features_only", "out_indices", "feature_cls", "feature_cfg"),
    )
)
# Far above anything timm's or torchvision's constructors are called with, far below what exhausts memory by itself.
MAX_ARG = 1_000_000
MAX_ITEMS = 1_000
MAX_DEPTH = 8
# Elements that building a base may allocate: 2 GiB at float32, unless the base needs more without any arguments.
MAX_ELEMENTS = 2**29
# Tensors that building a base may create, several times what the deepest of timm's models do.
MAX_TENSORS = 20_000
# timm keeps some of these for itself, so they are refused where config.json's model_args would pass them on.
FORBIDDEN_SETTINGS = frozenset(
    ("checkpoint_path", "weights", "progress", "pruned", "model_cfg", "kwargs_filter", "pretrained_strict")
)
# Where config.json would have weights come from, or how they are read: a folder holds its weights itself.
FOREIGN_SOURCES = ("url", "state_dict", "custom_load", "hf_hub_filename", "label_offset")


# ------------------------------------------------------------------------------------------------ the recipe


def _fail(where: str, got: object, needed: str) -> ArtifactError:
    where = where if len(where) <= 200 else f"{where[:200]}..."
    return ArtifactError(
        f"recipe {where!r}: got {reprlib.repr(got)}, needed {needed}; "
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
    if not is_int(recipe["format"]) or recipe["format"] != FORMAT:
        raise _fail("format", recipe["format"], f"{FORMAT} (a newer one needs a newer timm-autoslim)")
    if recipe["base"] is not None and not isinstance(recipe["base"], str):
        raise _fail("base", recipe["base"], "a name, or None")
    for part in ("base_args", "sizes", "attributes", "widths"):
        if not isinstance(recipe[part], Mapping) or not all(isinstance(key, str) for key in recipe[part]):
            raise _fail(part, recipe[part], "a mapping from names")
    for name, size in recipe["widths"].items():
        if not is_int(size) or size < 1:
            raise _fail(f"widths.{name}", size, "a positive integer")
    refused = sorted(FORBIDDEN_ARGS & set(recipe["base_args"]))
    if refused:
        raise _fail(f"base_args.{refused[0]}", recipe["base_args"][refused[0]], "only arguments that shape the base")
    _check_plain("base_args", recipe["base_args"], MAX_DEPTH)
    for part in ("sizes", "attributes"):
        _check_depth(part, recipe[part], MAX_DEPTH)
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


def _check_depth(where: str, value: object, depth: int) -> None:
    """Bound the levels, so that neither a copy nor a comparison of the recipe runs out of stack."""
    if isinstance(value, Mapping | list | tuple):
        if not depth:
            raise _fail(where, value, f"data of at most {MAX_DEPTH} levels")
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_depth(where, item, depth - 1)


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any]) -> nn.Module:
    """Shrink a freshly created base in place to what its recipe says; everything is checked before anything changes.

    Args:
        model: the recipe's base, as `create_base` returns it.
        recipe: the plain data of an extracted model's `autoslim` attribute. Each size is the length of the prefix
            that is kept of its axis; or the runs that are kept, for tensors that no checkpoint holds.

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
            found = store.get(parts[0])
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
        if not _fits(size, full):
            need = f"for each axis None, an integer from 1 to the size in {tuple(tensor.shape)}, or runs within it"
            raise _fail(where, sizes, need)
    return tuple(((0, size),) if is_int(size) else size and tuple(map(tuple, size)) for size in sizes)


def _fits(size: object, full: int) -> bool:
    """Whether this says what is kept of an axis: all (None), the first few, or ascending runs of (start, length)."""
    if size is None or (is_int(size) and 1 <= size <= full):
        return True
    end = 0
    for run in size if isinstance(size, list | tuple) else ():
        if not isinstance(run, list | tuple) or len(run) != 2 or not all(map(is_int, run)):
            return False
        if not end <= run[0] < run[0] + run[1] <= full:
            return False
        end = run[0] + run[1]
    return end > 0


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
    if is_int(now):
        if not (is_int(value) and 1 <= value <= now):
            raise _fail(where, value, f"an integer from 1 to {now}")
        return value
    if isinstance(now, float):
        # the only floats that widths move are scales such as head_dim ** -0.5, which grow as the width shrinks
        if not (isinstance(value, float) and math.isfinite(value) and value * now > 0):
            raise _fail(where, value, f"a finite number of the sign of {now}")
        return value
    if isinstance(now, Sequence) and not isinstance(now, str) and now and all(map(is_int, now)):
        given = value if isinstance(value, list | tuple) and len(value) == len(now) else [0] * len(now)
        if not all(is_int(v) and 1 <= v <= n for v, n in zip(given, now, strict=True)):
            raise _fail(where, value, f"{len(now)} positive integers, none above {tuple(now)}")
        return list(given) if isinstance(now, list) else tuple(given)
    raise _fail(where, value, f"a number or integers of {type(model).__name__}, which has none under this path")


# ------------------------------------------------------------------------------------------------ the entrypoint


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse to create tensors beyond a number of elements, before memory is taken for the one that exceeds it."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = limit
        self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # tensors are born with a size as their first argument: empty, zeros, ones, full, randn
        size = args[0] if args else None
        if isinstance(size, list | tuple) and all(map(is_int, size)):
            self.left -= math.prod(size)
            self.tensors += 1
        if self.tensors > MAX_TENSORS:
            self.left = -1
        if self.left < 0:
            raise MemoryError("too many elements for a base of this name")
        return func(*args, **(kwargs or {}))


def _bounded(base: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call what builds a part of the base; arguments may make it large only as far as the plain base is large."""
    guard = _Bounded(MAX_ELEMENTS)
    try:
        with guard:
            return function(*args, **kwargs)
    except Exception as error:
        if guard.left >= 0:
            raise
        try:
            with torch.device("meta"):
                usual = sum(parameter.numel() for parameter in create_raw(base).parameters())
        except ArtifactError:  # it needs arguments, or has no model without data
            usual = 0
        if 4 * usual <= MAX_ELEMENTS:
            raise _fail(
                "base_args",
                kwargs or args,
                f"arguments that build at most {MAX_ELEMENTS:,} numbers in {MAX_TENSORS:,} tensors",
            ) from error
    with _Bounded(4 * usual):
        return function(*args, **kwargs)


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
    refused = sorted(FORBIDDEN_SETTINGS & set(kwargs))
    if refused:
        raise _fail(f"model_args.{refused[0]}", kwargs[refused[0]], "only arguments that shape the model")
    native = checked["base_args"].get("num_classes", _base_cfg(base).num_classes)
    if not is_int(native) or native < 0:
        raise _fail("base_args.num_classes", native, "an integer, 0 for no head")
    wanted = native if num_classes is None else num_classes
    # The recipe holds the head's tensors if its base had a head: such a base is built, and the head changed afterwards.
    args["num_classes"] = wanted if bool(wanted) == bool(native) else native
    model = apply_recipe(_bounded(base, create_raw, base, **args), checked)
    if base.startswith(TORCHVISION):
        describe_features(model)
        if global_pool is not None or (wanted and not native):
            what = f"global_pool={global_pool!r}" if global_pool is not None else f"num_classes={wanted} without a head"
            raise ArtifactError(f"base {base!r} cannot take {what}: torchvision models have fixed heads; leave it out")
        if native and not wanted:
            cut_heads(model)
    elif hasattr(model, "reset_classifier") and (
        getattr(model, "num_classes", native) != wanted or global_pool not in (None, pool_type(model))
    ):
        head = (wanted,) if global_pool is None else (wanted, global_pool)
        _bounded(base, construct, model.reset_classifier, base, *head)
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
    found = None if base.startswith(TORCHVISION) else construct(get_pretrained_cfg, base, base)
    cfg = (found or PretrainedCfg()).to_dict(remove_source=True)
    return PretrainedCfg(**{k: v for k, v in cfg.items() if k not in ("architecture", "custom_load", "label_offset")})


def _source_cfg(base: str, given: Any) -> dict[str, Any]:
    """The data settings and the place of the weights, as timm's loader takes them."""
    if not given or isinstance(given, str):
        return dict(_base_cfg(base).to_dict())
    cfg = dict(given if isinstance(given, Mapping) else given.to_dict())
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    if cfg.get("source") in ("local-dir", "hf-hub"):
        cfg = {key: value for key, value in cfg.items() if key not in FOREIGN_SOURCES}
    weights = Path(cfg.get("file") or "") / "model.safetensors"
    if cfg.get("source") == "local-dir" and weights.is_file():
        # timm 1.0.16 reads a folder's weights with torch.load; as a file, every version reads safetensors
        cfg.update(source=None, file=str(weights))
    return cfg


def _with_versions(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """Give weights the version numbers that safetensors does not keep; torchvision's MNASNet needs them."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    return versioned


def _feature_cfg(model: nn.Module, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """How timm taps features of this model: the base's own indices, and an extractor that needs no rewriting."""
    base = recipe["base"]
    info: Any = getattr(model, "feature_info", None)
    if not info:
        raise ArtifactError(f"features_only=True: base {base!r} has no feature_info; use forward hooks instead")
    if base.startswith(TORCHVISION):
        return {"feature_cls": "fx", "out_indices": tuple(range(len(info)))}
    indices = tuple(range(len(info)))
    for device in ("meta", "cpu"):  # some bases cannot stand on the meta device
        try:
            with torch.device(device):
                probe: Any = timm.create_model(base, features_only=True, **recipe["base_args"])
            indices = tuple(probe.feature_info.out_indices)
            break
        except Exception:  # some bases have no extractor of their own
            continue
    return {"feature_cls": "getter" if hasattr(model, "forward_intermediates") else "hook", "out_indices": indices}


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
    refused = sorted(FORBIDDEN_SETTINGS & set(kwargs))
    if refused:
        raise _fail(f"model_args.{refused[0]}", kwargs[refused[0]], "only arguments that shape the model")
    cfg = _source_cfg(recipe["base"] or "", kwargs.pop("pretrained_cfg", None))
    channels, first_conv = (cfg.get("input_size") or (3,))[0], cfg.get("first_conv")
    if channels != 3 and kwargs.get("in_chans", channels) == channels:
        cfg["first_conv"] = None  # nothing to adapt, but older timm takes every checkpoint for one of three channels
    # what timm derives from the data settings yields to base_args, and these to what the user said
    yields = {"img_size"} & set(recipe["base_args"]) - set(kwargs)
    # timm keeps a dict that is not empty, so the builder can still fill it in once there is a model to look at
    features: dict[str, Any] = {"out_indices": (0, 1, 2, 3, 4)}

    def build(**args: Any) -> nn.Module:
        model = build_slimmed(recipe, **{key: value for key, value in args.items() if key not in yields})
        if kwargs.get("features_only"):
            features.update({k: v for k, v in _feature_cfg(model, recipe).items() if k not in kwargs})
        return model

    model: nn.Module = build_model_with_cfg(
        build,
        ARCHITECTURE,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=_with_versions,
        feature_cfg=features,
        **kwargs,
    )
    source: Any = model.pretrained_cfg
    source["first_conv"] = first_conv
    return model


register_model(autoslim)
