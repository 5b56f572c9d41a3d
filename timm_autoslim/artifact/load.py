"""Exported folder -> slim model through `timm.create_model`: the entrypoint that timm calls for such folders."""

from __future__ import annotations

import dataclasses
import reprlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, register_model
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from timm_autoslim.artifact.bases import build_on_meta, get_base_settings
from timm_autoslim.artifact.build import SlimBuilder
from timm_autoslim.artifact.config import EXPORT_AGAIN, Config, parse_data_settings, parse_settings, refuse_forbidden
from timm_autoslim.artifact.features import choose_feature_cfg
from timm_autoslim.artifact.folder import CONFIG, WEIGHTS, Header, check_weights, read_header, read_json
from timm_autoslim.artifact.limits import MemoryLimit
from timm_autoslim.artifact.outline import Outline
from timm_autoslim.artifact.preparation import write_input_size
from timm_autoslim.artifact.spec import ARCHITECTURE, Spec
from timm_autoslim.errors import ArgumentError, ArtifactError, AutoSlimError

# Arguments that timm or config.json add to those of the user.
_ADDED = ("pretrained_cfg_overlay", "pretrained_model_args", "cache_dir", "taps")
# With these arguments alone a model is the one that was exported.
_UNCHANGING = {"cache_dir", "global_pool", "pretrained_model_args"}


def autoslim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's entrypoint for exported folders: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        pretrained: load the folder's weights.
        **kwargs: `spec`, which config.json supplies, and anything that `timm.create_model` takes.

    Raises:
        ArtifactError: called without a spec, or with one that is malformed or does not fit its base.
    """
    data = kwargs.pop("spec", None)
    if data is None:
        raise _make_missing_spec_error(kwargs)
    source = _find_source(data, kwargs.pop("pretrained_cfg", None), pretrained, kwargs)
    refuse_forbidden(kwargs)
    try:
        return _load(source, pretrained, kwargs)
    except AutoSlimError:
        raise
    except Exception as error:  # timm and constructors may raise anything at all on what they do not expect
        if not source.place:
            raise
        names = reprlib.repr(sorted(k for k, v in kwargs.items() if v is not None and k not in _ADDED))
        text = str(error) if len(str(error)) <= 500 else f"{str(error)[:500]}..."
        raise ArtifactError(
            f"{source.place}: cannot be loaded with {names}: {type(error).__name__}: {text}; "
            "leave these arguments out, or export the model again"
        ) from error


def _make_missing_spec_error(kwargs: Mapping[str, Any]) -> ArtifactError:
    where, needed = f"timm.create_model({ARCHITECTURE!r})", "the spec of an exported model"
    if "recipe" in kwargs:
        got = "a model in the format of before the first release ('recipe')"
        return ArtifactError.at(where, got=got, needed=needed, remedy=EXPORT_AGAIN)
    remedy = (
        "load a folder by timm.create_model('local-dir:FOLDER', pretrained=True), or make one with timm_autoslim.export"
    )
    return ArtifactError.at(where, got="no spec=", needed=needed, remedy=remedy)


# ------------------------------------------------------------------------------------------------ where from


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from, checked.

    Attributes:
        place: its name, for messages; empty if it is no folder and no file.
        spec: how the model differs from its base.
        data: timm's data settings, with the file of the weights.
        header: the header of that file; None if weights are neither asked for nor at hand, or are a user's.
        global_pool: the pooling of the model that the weights are of; None for the base's.
    """

    place: str
    spec: Spec
    data: PretrainedCfg
    header: Header | None = None
    global_pool: str | None = None


def _find_source(data: Any, cfg: Any, pretrained: bool, kwargs: Mapping[str, Any]) -> Source:
    """Return where timm loads a model from; its files are read again and checked.

    Args:
        data: the spec as JSON data, of config.json or a user.
        cfg: what timm makes of a folder's or repository's data settings; None or a name if there is neither.
        pretrained, kwargs: the other arguments of the entrypoint.
    """
    settings = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg if isinstance(cfg, Mapping) else {}
    kind = settings.get("source")
    if kind not in ("local-dir", "hf-hub"):
        spec = Spec.parse(data)
        return Source("", spec, get_base_settings(spec.require_base()))
    place = str(settings["file" if kind == "local-dir" else "hf_hub_id"])
    if kind == "local-dir" and Path(place).is_file():
        # timm's scripts put a user's own weights in place of the folder (--pretrained-path), which is then not known
        parse_settings(kwargs.get("pretrained_model_args") or {})
        return _make_users_source(place, Spec.parse(data), settings, kwargs)

    def path(name: str) -> Path:
        if kind == "local-dir":
            return Path(place, name)
        return Path(download_from_hf(place, name, cache_dir=kwargs.get("cache_dir")))

    content = read_json(path(CONFIG))
    config = Config.parse(content, str(path(CONFIG)))
    spec = config.spec if content["model_args"]["spec"] == data else Spec.parse(data)
    file = settings.get("file")
    if kind == "hf-hub" and file and file != content["pretrained_cfg"].get("file"):  # again a user's, no stranger's
        return _make_users_source(str(file), spec, settings, kwargs)
    header = read_header(path(WEIGHTS)) if pretrained or (kind == "local-dir" and path(WEIGHTS).exists()) else None
    # As a file, every version of timm reads safetensors; of a folder 1.0.16 reads pickles, and all do if it has others.
    file_settings = {"source": None, "file": str(header.path) if header else None}
    cfg = dataclasses.replace(parse_data_settings(settings), **file_settings)
    return Source(place, spec, cfg, header, config.settings.get("global_pool"))


def _make_users_source(file: str, spec: Spec, settings: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Source:
    """Return the source of a user's own file, in place of the weights that a spec came with."""
    cfg = parse_data_settings({**settings, "num_classes": None})
    classes = settings.get("num_classes")  # timm's scripts ask for a new head by -1 classes
    cfg = dataclasses.replace(cfg, source=None, file=file, **({} if classes is None else {"num_classes": classes}))
    return Source(file, spec, cfg, global_pool=kwargs.get("global_pool"))


# ------------------------------------------------------------------------------------------------ loading


@dataclass(frozen=True)
class Changes:
    """In which parts a model that is asked for differs from the one that a file has the weights of.

    Attributes:
        classes: it has another number of classes, or is a backbone: the file's classifier is not loaded.
        head: it has no classifier where the file has one.
        size: it is for images of another size: the weights are resized.
        pooling: it was built with another pooling, so that it may lack modules that the file has weights of.
    """

    classes: bool
    head: bool
    size: bool
    pooling: bool


def find_changes(source: Source, kwargs: Mapping[str, Any], num_classes: int | None, fixed_head: bool) -> Changes:
    """Compare what a user asks for with the model that was exported.

    Args:
        source: what was exported.
        kwargs: the arguments of the entrypoint, in which those of config.json stand where the user gave none.
        num_classes: of the model that is built.
        fixed_head: whether its head is what it was built with, because it has no `reset_classifier`.
    """
    same_classes = num_classes == source.data.num_classes
    return Changes(
        classes=not same_classes or bool(kwargs.get("features_only")),
        head=num_classes == 0 and not same_classes,
        size=_is_resized(source, kwargs.get("img_size")),
        pooling=fixed_head and kwargs.get("global_pool") != source.global_pool,
    )


def _is_resized(source: Source, img_size: Any) -> bool:
    """Whether a user asks for another image size than that of the weights."""
    spec = source.spec
    exported = spec.base_args.get("img_size", get_base_settings(spec.require_base()).input_size[1:])
    sizes = [tuple(size) if isinstance(size, list | tuple) else (size, size) for size in (img_size, exported)]
    return img_size is not None and sizes[0] != sizes[1]


def _load(source: Source, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Let timm build the model, fill it with weights and wrap it as a backbone, as the arguments say."""
    spec, data = source.spec, source.data
    elements = source.header.elements if source.header else None
    builder = SlimBuilder(spec, MemoryLimit(spec.require_base(), elements), kwargs.pop("taps", None))
    # timm keeps a dict that is not empty, so `build` can still add to it when there is a model to look at
    users_features = kwargs.pop("feature_cfg", None) or {}
    features: dict[str, Any] = {"out_indices": (0, 1, 2, 3, 4), **users_features}
    # what timm derives from the data settings comes after base_args, and these after what the user said
    superseded = {"img_size"} & set(spec.base_args) - set(kwargs)

    def build(**args: Any) -> nn.Module:
        args = {key: value for key, value in args.items() if key not in superseded}
        from_file = pretrained and source.header is not None
        try:
            model = _build_for_file(builder, source, kwargs, args) if from_file else builder.build(args)
        except ArgumentError as error:
            if kwargs.get("features_only"):
                _refuse_arguments_of_backbones(builder, args, error)
            raise
        if kwargs.get("features_only"):
            features.update(_choose_features(model, spec, {*kwargs, *users_features}))
        return model

    def fill(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
        size = kwargs.get("img_size")
        return _fit_state(builder.resize(state, model, size) if _is_resized(source, size) else state, model)

    channels = data.input_size[0]
    same_channels = channels != 3 and kwargs.get("in_chans", channels) == channels
    model: nn.Module = build_model_with_cfg(
        build,
        ARCHITECTURE,
        pretrained,
        # nothing to convert, but older timm takes every checkpoint for one of three channels
        pretrained_cfg=dataclasses.replace(data, first_conv=None) if same_channels else data,
        pretrained_filter_fn=fill,
        feature_cfg=features,
        **kwargs,
    )
    _write_settings(model, data, kwargs.get("img_size"))
    if getattr(model, "autoslim", None) is spec:
        outline = Outline.draw(model, spec.sizes, spec.attributes)
        model.autoslim = spec.replace(outline=outline)
    return model


def _write_settings(model: nn.Module, data: PretrainedCfg, img_size: Any) -> None:
    """Write into a model's `pretrained_cfg` its first convolution, which timm was not told, and its image size."""
    settings: Any = model.pretrained_cfg
    settings["first_conv"] = data.first_conv
    if img_size is not None:
        sides = tuple(img_size) if isinstance(img_size, list | tuple) else (img_size, img_size)
        write_input_size(model, (settings["input_size"][0], *sides))


def _build_for_file(
    builder: SlimBuilder, source: Source, kwargs: Mapping[str, Any], args: Mapping[str, Any]
) -> nn.Module:
    """Build a model that a file will fill, and compare the file's header with it.

    Args:
        builder: of the model.
        source: of the file.
        kwargs: the arguments of the entrypoint.
        args: those of the builder, which timm adds to.
    """
    assert source.header is not None
    # Asked for just as it was exported, a model takes every number from the file: none has to be drawn before.
    unfilled = {key for key, value in kwargs.items() if value is not None} <= _UNCHANGING
    model = builder.build(args, unfilled=unfilled)
    fixed_head = not hasattr(model, "reset_classifier")
    changes = find_changes(source, kwargs, getattr(model, "num_classes", None), fixed_head)
    if unfilled and (changes.classes or changes.pooling):  # a part of it will not come from the file
        model = builder.build(args)
    exported, data = model, source.data
    if changes.size or changes.head or changes.pooling:
        exported = builder.build_exported(args, data.num_classes, source.global_pool)
    channels = args.get("in_chans", data.input_size[0])
    check_weights(source.header, exported, model, data, skip_classifiers=changes.classes, in_chans=channels)
    return model


def _refuse_arguments_of_backbones(builder: SlimBuilder, args: Mapping[str, Any], error: ArgumentError) -> None:
    """Raise ArgumentError that says so, if the base takes these arguments in the class of its backbone alone."""
    spec, call = builder.spec, builder.limit.call
    base, arguments = spec.require_base(), spec.copy_arguments()
    try:
        backbone = call(build_on_meta, timm.create_model, base, features_only=True, **{**arguments, **args})
        model = type(call(build_on_meta, timm.create_model, base, **arguments)).__name__
    except Exception:  # it does not take them there either
        return
    names = ", ".join(sorted(args.keys() - arguments.keys() - {"num_classes", "in_chans"}))
    raise ArgumentError.at(
        f"base {base!r}",
        got=f"{names}, which {type(backbone).__name__} takes and {model} does not",
        needed=f"arguments of {model}, from which the features of a slim model are taken",
        remedy="leave it out, or slim a base whose model takes it, as mobilenetv2_100 takes output_stride",
    ) from error


def _choose_features(model: nn.Module, spec: Spec, settings: set[str]) -> dict[str, Any]:
    """Return how to take features from a model, but for what a user has set."""
    features = choose_feature_cfg(model, spec)
    if "feature_cls" in settings:  # the other settings belong to the base's own kind
        features = {"out_indices": features["out_indices"]}
    return {key: value for key, value in features.items() if key not in settings}


def _fit_state(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """Leave out weights of a head that the model lacks, and give the rest the version numbers of the model's.

    safetensors does not keep the version numbers of a state dict, which torchvision's MNASNet needs.
    """
    needed: Any = model.state_dict()
    fitted = OrderedDict((name, tensor) for name, tensor in state.items() if name in needed)
    fitted._metadata = getattr(needed, "_metadata", {})  # type: ignore[attr-defined]
    return fitted


register_model(autoslim)
