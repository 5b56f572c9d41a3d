"""Folder -> plain model through `timm.create_model`: one timm entrypoint that builds the base and applies a recipe."""

from __future__ import annotations

import reprlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, register_model
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from timm_autoslim.artifact.apply import apply_checked, apply_part, apply_recipe
from timm_autoslim.artifact.bases import create_base, create_raw, find_filter
from timm_autoslim.artifact.construct import ARCHITECTURE, TORCHVISION, construct, hollow
from timm_autoslim.artifact.features import feature_cfg
from timm_autoslim.artifact.folder import (
    CONFIG,
    FORBIDDEN_SETTINGS,
    WEIGHTS,
    Header,
    check_data_settings,
    check_settings,
    check_weights,
    read_config,
    read_header,
)
from timm_autoslim.artifact.limits import bounded, bounded_unfilled, fail
from timm_autoslim.artifact.spec import check_recipe
from timm_autoslim.artifact.torchvision import cut_heads, describe_features
from timm_autoslim.errors import ArtifactError, AutoSlimError
from timm_autoslim.utils.arguments import is_int

HANDED_ON = ("pretrained_cfg_overlay", "pretrained_model_args", "cache_dir", "taps")  # by timm or config.json

__all__ = ["apply_recipe", "autoslim", "build_slimmed", "check_recipe", "create_base"]


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
    return _build(check_recipe(recipe), None, None, False, num_classes, global_pool, **kwargs)


def _build(
    checked: dict[str, Any],
    file_elements: int | None,
    taps: Any,
    unfilled: bool,
    num_classes: int | None = None,
    global_pool: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    base = checked["base"]
    if base is None:
        raise ArtifactError("recipe 'base': got None, needed the name that creates the base; export with base=")
    args = {**checked["base_args"], **kwargs}
    refused = sorted(FORBIDDEN_SETTINGS & set(kwargs))
    if refused:
        raise fail(f"model_args.{refused[0]}", kwargs[refused[0]], "only arguments that shape the model")
    native = checked["base_args"].get("num_classes", _base_cfg(base).num_classes)
    if not is_int(native) or native < 0:
        raise fail("base_args.num_classes", native, "an integer, 0 for no head")
    wanted = native if num_classes is None else num_classes
    if not is_int(wanted) or wanted < 0:
        raise ArtifactError(f"num_classes: got {reprlib.repr(wanted)}, needed an integer, 0 for no head; pass another")
    # The recipe holds the head's tensors if its base had a head: such a base is built, and the head changed afterwards.
    args["num_classes"] = wanted if bool(wanted) == bool(native) else native
    if unfilled and file_elements is not None:
        model = bounded_unfilled(base, file_elements, create_raw, base, **args)
    else:
        model = bounded(base, file_elements, create_raw, base, **args)
    assert isinstance(model, nn.Module)
    # An encoder takes its pooling when it is built, and may then lack modules that the recipe tells of.
    late = base.startswith(TORCHVISION) or hasattr(model, "reset_classifier")
    if not late and global_pool not in (None, pool_type(model)):
        asked = bounded(base, file_elements, create_raw, base, **args, global_pool=global_pool)
        return apply_part(asked, model, checked)
    apply_checked(model, checked)
    if base.startswith(TORCHVISION):
        describe_features(model, taps)
        if global_pool is not None or (wanted and not native):
            what = f"global_pool={global_pool!r}" if global_pool is not None else f"num_classes={wanted} without a head"
            raise ArtifactError(f"base {base!r} cannot take {what}: torchvision models have fixed heads; leave it out")
        if native and not wanted:
            cut_heads(model)
    elif hasattr(model, "reset_classifier") and (
        getattr(model, "num_classes", native) != wanted or global_pool not in (None, pool_type(model))
    ):
        head = (wanted,) if global_pool is None else (wanted, global_pool)
        bounded(base, file_elements, construct, model.reset_classifier, base, *head)
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


def _is_resized(recipe: Mapping[str, Any], cfg: Mapping[str, Any], asked: Any) -> bool:
    """Whether a user asks for another image size than that of the weights."""
    own = recipe["base_args"].get("img_size", (cfg.get("input_size") or ())[1:])
    sizes = [tuple(size) if isinstance(size, list | tuple) else (size, size) for size in (asked, own)]
    return asked is not None and sizes[0] != sizes[1]


def _as_stored(
    recipe: dict[str, Any], elements: int | None, taps: Any, args: Mapping[str, Any], own: Mapping[str, Any]
) -> nn.Module:
    """The model that the weights are of, with their own image size, classes and pooling; without data if that works."""
    args = {key: value for key, value in args.items() if key not in ("img_size", "num_classes", "global_pool")}
    return hollow(_build, recipe, elements, taps, False, **own, **args)


def _resize(
    state: Mapping[str, Tensor], model: nn.Module, recipe: Mapping[str, Any], elements: int | None, size: Any
) -> Mapping[str, Tensor]:
    """Fit weights to another image size by the base's own function, as timm does for the base's weights."""
    base = recipe["base"]
    fit = bounded(base, elements, find_filter, base, **{**recipe["base_args"], "img_size": size})
    if fit is None:
        return state
    fitted: dict[str, Tensor] = bounded(base, elements, fit, dict(state), model)
    needed = model.state_dict()
    kept = {name: t for name, t in state.items() if name in needed and t.shape == needed[name].shape}
    fitted = {**kept, **fitted}
    if fitted.keys() != state.keys():
        name = min(fitted.keys() ^ state.keys())
        raise ArtifactError(
            f"img_size={reprlib.repr(size)}: {name} of base {base!r} cannot be resized: its own function lost or "
            "renamed it; leave img_size= out"
        )
    return fitted


def _fit(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """Leave out weights of a head that the model lacks, and number the rest as torchvision's MNASNet needs them.

    safetensors does not keep the version numbers of a state dict.
    """
    needed: Any = model.state_dict()
    kept = OrderedDict((name, tensor) for name, tensor in state.items() if name in needed)
    kept._metadata = getattr(needed, "_metadata", {})  # type: ignore[attr-defined]
    return kept


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
    source = _find(kwargs.pop("pretrained_cfg", None), pretrained, kwargs)
    refused = sorted(FORBIDDEN_SETTINGS & set(kwargs))
    if refused:
        raise fail(f"model_args.{refused[0]}", kwargs[refused[0]], "only arguments that shape the model")
    if source is None:
        recipe = check_recipe(kwargs.pop("recipe"))
        cfg = dict(_base_cfg(recipe["base"] or "").to_dict())
        return _load(_Source("", recipe, cfg, None, {}), recipe, pretrained, kwargs)
    recipe = kwargs.pop("recipe")
    recipe = source.recipe if recipe == source.recipe else check_recipe(recipe)
    try:
        return _load(source, recipe, pretrained, kwargs)
    except AutoSlimError:
        raise
    except Exception as error:  # timm and constructors may raise anything at all on what they do not expect
        asked = reprlib.repr(sorted(k for k, v in kwargs.items() if v is not None and k not in HANDED_ON))
        said = str(error) if len(str(error)) <= 500 else f"{str(error)[:500]}..."
        raise ArtifactError(
            f"{source.place}: cannot be loaded with {asked}: {type(error).__name__}: {said}; "
            "leave these arguments out, or export the model anew"
        ) from error


@dataclass(frozen=True)
class _Source:
    """Where a model is loaded from, checked.

    Attributes:
        place: its name, for messages.
        recipe: the recipe in config.json.
        cfg: timm's data settings, with the file of the weights.
        header: the head of that file, None if weights are not wanted and none are at hand.
        own: the classes and the pooling of the model that the weights are of.
    """

    place: str
    recipe: dict[str, Any]
    cfg: dict[str, Any]
    header: Header | None
    own: dict[str, Any]


def _find(given: Any, pretrained: bool, kwargs: Mapping[str, Any]) -> _Source | None:
    """What timm found in a folder or on the Hub, read again and checked; None where it found the recipe elsewhere."""
    if not given or isinstance(given, str):
        return None
    given = given if isinstance(given, Mapping) else given.to_dict()
    kind = given.get("source")
    if kind not in ("local-dir", "hf-hub"):
        return None
    place = str(given["file" if kind == "local-dir" else "hf_hub_id"])
    if kind == "local-dir" and Path(place).is_file():
        # timm's scripts put a user's own weights in place of the folder (--pretrained-path), which is no longer known
        check_settings({k: v for k, v in (kwargs.get("pretrained_model_args") or {}).items() if k != "recipe"})
        return _other_weights(place, given, kwargs["recipe"], kwargs)

    def path(name: str) -> Path:
        if kind == "local-dir":
            return Path(place, name)
        return Path(download_from_hf(place, name, cache_dir=kwargs.get("cache_dir")))

    config = read_config(path(CONFIG))
    file = given.get("file")
    if kind == "hf-hub" and file and file != config["pretrained_cfg"].get("file"):  # again a user's, not a stranger's
        return _other_weights(str(file), given, config["model_args"]["recipe"], kwargs)
    cfg = check_data_settings(given)
    there = pretrained or (kind == "local-dir" and path(WEIGHTS).exists())
    header = read_header(path(WEIGHTS)) if there else None
    # As a file, every version of timm reads safetensors; of a folder 1.0.16 reads pickles, and all do if it has others.
    cfg.update(source=None, file=str(header.path) if header else None)
    args = config["model_args"]
    own = {"num_classes": cfg.get("num_classes"), "global_pool": args.get("global_pool")}
    return _Source(place, args["recipe"], cfg, header, own)


def _other_weights(file: str, given: Mapping[str, Any], recipe: Any, kwargs: Mapping[str, Any]) -> _Source:
    """A user's own file in place of the weights that a recipe came with; timm asks for a new head by -1 classes."""
    cfg = {**check_data_settings({**given, "num_classes": None}), "num_classes": given.get("num_classes")}
    cfg.update(source=None, file=file)
    return _Source(file, check_recipe(recipe), cfg, None, {"global_pool": kwargs.get("global_pool")})


def _load(source: _Source, recipe: dict[str, Any], pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Let timm build the model, fill it and wrap it."""
    header, cfg, own = source.header, source.cfg, source.own
    channels, first_conv = (cfg.get("input_size") or (3,))[0], cfg.get("first_conv")
    if channels != 3 and kwargs.get("in_chans", channels) == channels:
        cfg["first_conv"] = None  # nothing to adapt, but older timm takes every checkpoint for one of three channels
    # what timm derives from the data settings yields to base_args, and these to what the user said
    yields = {"img_size"} & set(recipe["base_args"]) - set(kwargs)
    # timm keeps a dict that is not empty, so the builder can still fill it in once there is a model to look at
    chosen = kwargs.pop("feature_cfg", None) or {}
    features: dict[str, Any] = {"out_indices": (0, 1, 2, 3, 4), **chosen}
    taps, elements = kwargs.pop("taps", None), header.elements if header else None

    size = kwargs.get("img_size")
    resized = _is_resized(recipe, cfg, size)
    # Asked for just as it was exported, a model takes every number from the file: none has to be drawn before.
    asked = {key for key, value in kwargs.items() if value is not None}
    unfilled = header is not None and pretrained and asked <= {"cache_dir", "global_pool", "pretrained_model_args"}

    def build(**args: Any) -> nn.Module:
        args = {key: value for key, value in args.items() if key not in yields}
        model = _build(recipe, elements, taps, unfilled, **args)
        if header is not None and pretrained:
            other = bool(kwargs.get("features_only")) or getattr(model, "num_classes", None) != cfg.get("num_classes")
            headless = getattr(model, "num_classes", None) == 0 != cfg.get("num_classes")
            poolless = not hasattr(model, "reset_classifier") and kwargs.get("global_pool") != own["global_pool"]
            if unfilled and (other or headless or poolless):  # a part of it will not come from the file
                model = _build(recipe, elements, taps, False, **args)
            stored = _as_stored(recipe, elements, taps, args, own) if resized or headless or poolless else model
            settings = {**cfg, "first_conv": first_conv}
            check_weights(header, stored, model, settings, other, args.get("in_chans", channels))
        if kwargs.get("features_only"):
            given, found = {*kwargs, *chosen}, feature_cfg(model, recipe)
            if "feature_cls" in given:  # what else there is belongs to the base's own kind
                found = {"out_indices": found["out_indices"]}
            features.update({k: v for k, v in found.items() if k not in given})
        return model

    def fill(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
        return _fit(_resize(state, model, recipe, elements, size) if resized else state, model)

    model: nn.Module = build_model_with_cfg(
        build,
        ARCHITECTURE,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=fill,
        feature_cfg=features,
        **kwargs,
    )
    settings: Any = model.pretrained_cfg
    settings["first_conv"] = first_conv
    return model


register_model(autoslim)
