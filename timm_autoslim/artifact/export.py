"""Slim model -> folder (model.safetensors, config.json, README.md) that `timm.create_model` loads."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import FeatureInfo, PretrainedCfg
from torch import Tensor, nn

from timm_autoslim.artifact.bases import build_on_meta, create_meta_base, get_base_settings
from timm_autoslim.artifact.build import build_slim, find_pool_type
from timm_autoslim.artifact.card import check_figures, write_card
from timm_autoslim.artifact.compare import find_difference, find_failure, find_unused_modules, make_images
from timm_autoslim.artifact.config import Config, parse_settings
from timm_autoslim.artifact.drafts import create_folder, refuse_existing
from timm_autoslim.artifact.folder import copy_state, write_files
from timm_autoslim.artifact.parts import advise
from timm_autoslim.artifact.preparation import measure_pool_size, merge_settings
from timm_autoslim.artifact.pruned import PRUNED, write_pruned
from timm_autoslim.artifact.refusals import refuse_stale, refuse_without_numbers, require_spec
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.artifact.torchvision import list_taps
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.arguments import check_path

CARD = "README.md"


def export(
    model: nn.Module,
    out: str | Path,
    *,
    base: str | None = None,
    base_args: Mapping[str, object] | None = None,
    card: Mapping[str, object] | None = None,
) -> Path:
    """Write a slim model to a new folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    Before the folder appears, what was written is loaded and compared with `model`: the weights must be equal, and so
    must the outputs for an image (with weights that hide no layer, so not those at zero). A folder that exists
    therefore also loads, and is the same model. It appears at once or not at all, also when the process is killed.
    Loading needs `import timm_autoslim` and `timm.create_model`.

    How images are prepared is what the model's `pretrained_cfg` says, as everywhere in timm. `supernet.extract` writes
    into it the size of the images that the supernet was traced with. If you have trained at another size, or with
    another normalisation, change it before you export: `model.pretrained_cfg["input_size"] = (3, 96, 96)`.

    Args:
        model: a slim model, such as `supernet.extract` returns, fine-tuned or calibrated; its head and its input
            channels may have been changed since.
        out: the folder to create.
        base: the name that creates the base (`resnet50`, `torchvision/resnet18`), where the model's spec has none.
        base_args: the arguments that the base was created with; they replace the spec's.
        card: figures for the model card, by label, such as `{"MACs": "300M", "params": 2_000_000, "top-1": 71.9}`.

    Returns:
        The folder's path.

    Raises:
        OutputExistsError: `out` exists.
        StaleStatisticsError: BatchNorm statistics of a narrowed model are not its own.
        ArtifactError: the model has no spec or no base, is a backbone (`features_only=True`), has weights that are
            NaN or on the meta device, or what the folder builds differs from it.

    Example:
        >>> import tempfile, timm, torch
        >>> from timm_autoslim import convert, export
        >>> base = timm.create_model("resnet10t", num_classes=10)
        >>> model = convert(base, torch.zeros(1, 3, 32, 32), base_args={"num_classes": 10}).extract()
        >>> with tempfile.TemporaryDirectory() as runs:
        ...     folder = export(model, f"{runs}/slim", card={"top-1": 71.9})
        ...     loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
        >>> loaded.autoslim == model.autoslim
        True
    """
    folder = check_path("out", out, ArtifactError)
    refuse_existing(folder)
    figures = check_figures(card)
    spec = _find_spec(model, base, base_args)
    refuse_without_numbers(model)
    with torch.random.fork_rng(devices=[]):  # building draws random numbers
        rebuilt, changes = _rebuild(model, spec)
        config = _make_config(model, rebuilt, spec, changes)
        size = config.data.input_size
        refuse_stale(model, spec, lambda: find_unused_modules(model, make_images(size)))
        tensors = copy_state(model)
        num_features: Any = getattr(model, "num_features", None) or getattr(rebuilt, "num_features", 0)
        with create_folder(folder) as draft:
            write_files(draft, tensors, config.to_dict(num_features, find_pool_type(model)))
            _prove_folder(draft, model, tensors, spec, size)
            timm_code = write_pruned(draft / PRUNED, model, spec, changes, size)
            write_card(draft / CARD, folder.name, config, figures, rebuilt, timm_code)
    return folder


# ------------------------------------------------------------------------------------------------ what is refused


def _find_spec(model: nn.Module, base: str | None, base_args: Mapping[str, object] | None) -> Spec:
    """Return the model's spec, with its base."""
    kind, spec = type(model).__name__, require_spec(model, "export")
    if isinstance(getattr(model, "feature_info", None), FeatureInfo):
        raise ArtifactError.at(
            kind,
            got="a backbone (features_only=True), which no folder describes",
            needed="the model that it is made of",
            remedy="slim and export that, and load it with features_only=True, or write this one by timm_autoslim.save",
        )
    if base_args is not None and not isinstance(base_args, Mapping):
        raise ArtifactError.at("base_args", got=reprlib.repr(base_args), needed="a mapping from names of arguments")
    spec = spec.replace(
        base=spec.base if base is None else base, base_args=spec.base_args if base_args is None else base_args
    )
    if spec.base is None:
        raise ArtifactError.at(
            kind,
            got="a spec without a base",
            needed="the name that creates the model before slimming",
            remedy="pass base= (a timm name or 'torchvision/NAME') and base_args= to export() or convert(); "
            f"{advise(model)}",
        )
    return spec


def _refuse_failing(model: nn.Module, spec: Spec, size: Sequence[int]) -> None:
    """Raise ArtifactError for a model that takes no image, though its base does."""
    failure = find_failure(model, lambda: create_meta_base(spec.require_base(), **spec.copy_arguments()), size)
    if failure:
        raise ArtifactError.at(
            type(model).__name__,
            got=f"a forward that raises {failure}",
            needed="one that takes images, as the base's does",
            remedy="if this was a part of another model, which left out its head, call reset_classifier(0) on it first",
        )


def _rebuild(model: nn.Module, spec: Spec) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model again on the meta device, and compare names and shapes of its tensors.

    Returns:
        What was built, and what a user changed since the base was created, as arguments of `timm.create_model`.
    """
    rebuilt = build_on_meta(build_slim, spec)
    changes = _find_changes(model, rebuilt)
    if changes:
        rebuilt = build_on_meta(build_slim, spec, **changes)
    advice = _advise(spec)
    if type(rebuilt) is not type(model):
        kinds = type(model).__name__, type(rebuilt).__name__
        raise ArtifactError.at("model", got=f"a {kinds[0]}", needed=f"a {kinds[1]}", remedy=advice)
    shapes, needed_shapes = _list_shapes(model), _list_shapes(rebuilt)
    for name in (*needed_shapes, *shapes):
        got, needed = shapes.get(name, "no such tensor"), needed_shapes.get(name, "no such tensor")
        if got != needed or got == "no tensor":
            raise ArtifactError.at(name, got=got, needed=f"{needed} as the base and the spec build it", remedy=advice)
    return rebuilt, changes


def _list_shapes(model: nn.Module) -> dict[str, str]:
    state: Mapping[str, object] = model.state_dict()
    return {k: f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else "no tensor" for k, v in state.items()}


def _prove_folder(
    draft: Path, model: nn.Module, tensors: Mapping[str, Tensor], spec: Spec, size: Sequence[int]
) -> None:
    """Load what was written, and compare its weights and its outputs for an image with the model's."""
    loaded: nn.Module = timm.create_model(f"local-dir:{draft}", pretrained=True)
    state = loaded.state_dict()
    differing = next((n for n, t in tensors.items() if not torch.equal(state[n].cpu().to(t.dtype), t)), None)
    gap = f"other numbers in {differing}" if differing else find_difference(model, loaded, size)
    if gap:
        raise ArtifactError.at(
            type(model).__name__,
            got=f"{gap}, when the folder was loaded again",
            needed="the same model",
            remedy=_advise(spec),
        )
    _refuse_failing(model, spec, size)


def _advise(spec: Spec) -> str:
    return (
        f"pass base_args= with the arguments that {spec.base!r} was created with, and base= if it was another. "
        "Changes by hand after extract() are in no folder: undo them before export, and make them on the loaded model"
    )


# ------------------------------------------------------------------------------------------------ what is written


def _find_changes(model: nn.Module, rebuilt: nn.Module) -> dict[str, Any]:
    """Return what a user may have changed since the base was created: classes, input channels and pooling."""
    cfg: Any = rebuilt.pretrained_cfg
    changes: dict[str, Any] = {}
    native = cfg.get("num_classes")
    classes = _count_outputs(model, cfg.get("classifier"))
    if classes is None:
        classes = getattr(model, "num_classes", native)
    if classes != getattr(rebuilt, "num_classes", native):
        changes["num_classes"] = classes
    inputs, rebuilt_inputs = _count_inputs(model, cfg.get("first_conv")), _count_inputs(rebuilt, cfg.get("first_conv"))
    if inputs and rebuilt_inputs and inputs != rebuilt_inputs:
        # a ratio, because some stems fold pixels into channels before their first convolution
        channels = getattr(rebuilt, "in_chans", None) or cfg["input_size"][0]
        changes["in_chans"] = max(1, channels * inputs // rebuilt_inputs)
    pool = find_pool_type(model)
    if pool is not None and pool != find_pool_type(rebuilt):
        changes["global_pool"] = pool
    return changes


def _find_module(model: nn.Module, names: Any) -> nn.Module | None:
    """Return the module under a name of timm's data settings, which may hold none, one or several."""
    name = names[0] if isinstance(names, list | tuple) and names else names
    return dict(model.named_modules()).get(name) if isinstance(name, str) else None


def _count_outputs(model: nn.Module, names: Any) -> int | None:
    layer = _find_module(model, names)
    if isinstance(layer, nn.Identity):
        return 0
    weight = getattr(layer, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def _count_inputs(model: nn.Module, names: Any) -> int | None:
    layer = _find_module(model, names)
    weight = getattr(layer, "weight", None)
    return int(weight.shape[1]) * int(getattr(layer, "groups", 1)) if isinstance(weight, Tensor) else None


def _make_config(model: nn.Module, rebuilt: nn.Module, spec: Spec, changes: Mapping[str, Any]) -> Config:
    """Return the content of the folder's config.json."""
    rebuilt_cfg: Any = rebuilt.pretrained_cfg
    classes = changes.get("num_classes", getattr(rebuilt, "num_classes", rebuilt_cfg["num_classes"]))
    channels = changes.get("in_chans", spec.base_args.get("in_chans", rebuilt_cfg["input_size"][0]))
    dropped = {"state_dict", "architecture", "label_offset"}  # loaded weights have had their label offset applied
    cfg: Any = getattr(model, "pretrained_cfg", None)
    merged = merge_settings(cfg if isinstance(cfg, Mapping) else {}, rebuilt_cfg, channels)
    if classes != merged.get("num_classes"):
        dropped |= {"label_names", "label_descriptions"}
    if get_base_settings(spec.require_base()).pool_size and not merged.get("pool_size"):
        merged["pool_size"] = measure_pool_size(rebuilt, merged["input_size"])
    merged.update(first_conv=rebuilt_cfg.get("first_conv"), classifier=rebuilt_cfg.get("classifier"), custom_load=False)
    merged["num_classes"] = classes
    names = {field.name for field in fields(PretrainedCfg)} - dropped
    data = PretrainedCfg(**{key: value for key, value in merged.items() if key in names})
    settings = {key: value for key, value in changes.items() if key == "global_pool"}
    if spec.from_torchvision:  # measuring them at every loading would take a forward
        settings["taps"] = list_taps(rebuilt)
    return Config(spec, data, parse_settings(settings))
